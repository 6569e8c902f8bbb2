"""What a replay came to, as lines for a person and as JSON for a program."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from numpy.typing import NDArray

from streamlstm.config.model import Config
from streamlstm.engine.report import EXPERTS
from streamlstm.service.replay import Summary
from streamlstm.service.scores import Score

_SHOWN = (1, 2, 3, 6, 12, 24, 48, 96, 168, 336, 672)
_NAMES = {"lstm": "lstm", "last_value": "last value", "seasonal_naive": "seasonal"}


class Result(NamedTuple):
    """Scores, counts and time. ``standardise`` and ``score_from`` say how it was scored."""

    config: Config
    score: Score
    summary: Summary
    elapsed_s: float
    standardise: int | None
    score_from: int
    digests: Mapping[str, str]


def as_lines(result: Result, *, recorded: bool) -> Iterator[str]:
    """The table, the summary, and digests where they were asked for."""
    yield from _table(result)
    summary, elapsed_s = result.summary, result.elapsed_s
    outcomes = [f"{n:,} {o.name.lower()}" for o, n in summary.records.items() if n]
    total = sum(summary.records.values())
    yield f"records   {total:,}" + (f" = {' + '.join(outcomes)}" if outcomes else "")
    if summary.rejected:
        yield "rejected  " + ", ".join(f"{n:,} {reason}" for reason, n in summary.rejected.most_common())
    if (first := summary.first_rejected) is not None:
        where = f"{first.topic}-{first.partition} @ {first.offset} row {first.row}"
        yield f"          the first: {where}: {': '.join(filter(None, (first.path, first.message)))!r}"
    skipped = f", {summary.skipped_updates:,} skipped" if summary.skipped_updates else ""
    yield f"updates   {summary.updates:,}{skipped}"
    yield f"time      {elapsed_s:.1f} s, {total / max(elapsed_s, 1e-9):,.0f} records/s"
    if recorded:
        equal = summary.compared - summary.differing
        yield f"steps     {summary.steps:,}; digests: {equal:,} as recorded, {summary.differing:,} differ"
        for name, digest in result.digests.items():
            yield f"{name:<9} {digest}"


def _table(result: Result) -> Iterator[str]:
    """MSE and MAE by horizon and expert, and the model's skill against the others."""
    score, config = result.score, result.config
    experts = _experts(config)
    names = [_NAMES[EXPERTS[x]] for x in experts]
    what = (
        "in the units of the values"
        if result.standardise is None
        else f"standardised by the first {result.standardise:,} values"
    )
    where = f", scored from row {result.score_from:,}" if result.score_from else ""
    left_out = f", {score.left_out:,} constant series left out" if score.left_out else ""
    yield f"{what}{where}{left_out}"
    width = 11 * len(names)
    yield f"{'':7} {'':>12} {' MSE':<{width}} {' MAE':<{width}} {' skill against':<{width - 11}}".rstrip()
    columns = "".join(f"{n:>11}" for n in names)
    yield f"{'horizon':>7} {'pairs':>12} {columns} {columns} " + "".join(f"{n:>11}" for n in names[1:])
    horizons = config.model.horizons
    for k in [*(j - 1 for j in sorted({*_SHOWN, horizons}) if j <= horizons), horizons]:
        mse = "".join(_number(score.mse_XK1[x, k]) for x in experts)
        mae = "".join(_number(score.mae_XK1[x, k]) for x in experts)
        skill = "".join(_number(score.skill_XK1[x, k], "+.3f") for x in experts[1:])
        label = "all" if k == horizons else str(k + 1)
        yield f"{label:>7} {score.pairs_XK1[0, k]:>12,} {mse} {mae} {skill}"
    yield ""


def _experts(config: Config) -> list[int]:
    """Those that are worth showing: without a season the seasonal naive is the last value again."""
    return [x for x, name in enumerate(EXPERTS) if name != "seasonal_naive" or config.season is not None]


def _number(value: float, spec: str = ".4f") -> str:
    if math.isnan(value):
        return f"{'–':>11}"
    text = f"{value:{spec}}"
    return f"{text if len(text) <= 10 else f'{value:.4g}':>11}"


def as_json_text(result: Result) -> str:
    """All of it, every horizon; what is not known is null."""
    score, summary, horizons = result.score, result.summary, result.config.model.horizons
    experts = _experts(result.config)

    def by_expert(values_XK1: NDArray[Any], k: int, first: int = 0) -> dict[str, float]:
        return {EXPERTS[x]: values_XK1[x, k].item() for x in experts[first:]}

    value = {
        "records": {outcome.name.lower(): n for outcome, n in summary.records.items()},
        "rejected": dict(summary.rejected),
        "messages": summary.messages,
        "steps": summary.steps,
        "updates": summary.updates,
        "updates_skipped": summary.skipped_updates,
        "seconds": result.elapsed_s,
        "standardised": result.standardise,
        "score_from": result.score_from,
        "left_out": score.left_out,
        "scores": [
            {
                "horizon": "all" if k == horizons else k + 1,
                "pairs": by_expert(score.pairs_XK1, k),
                "mse": by_expert(score.mse_XK1, k),
                "mae": by_expert(score.mae_XK1, k),
                "skill": by_expert(score.skill_XK1, k, 1),
            }
            for k in range(horizons + 1)
        ],
        "recorded_digests": {"compared": summary.compared, "differing": summary.differing},
        "digests": result.digests,
    }
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
