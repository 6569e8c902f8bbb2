"""``streamlstm replay``: history through the same loop, and how good the forecasts were."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from streamlstm.cli.options import examples, suggest, with_loaded

if TYPE_CHECKING:
    from streamlstm.config.load import Loaded


@click.command(
    epilog=examples(
        "streamlstm replay -c config/etth2.yaml --from ETTh2.csv --rows 14400 --standardise 2880 --score-from 3600",
        "streamlstm replay -c config/metrics-json.yaml --from day1.ndjson --from day2.ndjson --out forecasts.parquet",
        "streamlstm replay -c config/metrics-json.yaml --from year.ndjson --out f.jsonl --checkpoint-to year --resume",
        "streamlstm replay -c config/metrics-json.yaml --from metrics.raw --start 2026-01-01T00:00:00Z",
        "streamlstm replay -c config/metrics-json.yaml --cuts progress --json",
        "streamlstm replay -c config/metrics-json.yaml --cuts progress --from-checkpoint latest --out f.jsonl --strict",
    )
)
@with_loaded
@click.option(
    "--from", "sources", multiple=True, metavar="FILE|TOPIC", help="What to read: files in this order, or input topics."
)
@click.option("--start", metavar="TIME", help="Of a topic: from this broker timestamp on.")
@click.option("--end", metavar="TIME", help="Of a topic: up to this broker timestamp.  [default: its end now]")
@click.option("--rows", type=click.IntRange(min=1), help="Stop after so many messages (lines of a file).")
@click.option(
    "--score-from",
    type=click.IntRange(min=0),
    default=0,
    metavar="ROW",
    help="Score forecasts whose first target is this row (0-based offset) or later.",
)
@click.option(
    "--standardise",
    type=click.IntRange(min=1),
    metavar="ROWS",
    help="Divide a series' errors by the standard deviation of its first so many values.",
)
@click.option(
    "--cuts",
    type=click.Choice(["progress"]),
    help="Take the cuts a live run recorded, compare digests, and print those of weights and series.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write forecasts to this file: .jsonl or .ndjson has the published bytes, one forecast a line; any other is "
    "Parquet, with the truth that came.",
)
@click.option(
    "--dead-letters",
    "dead_letters",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write what could not be used to this NDJSON file.",
)
@click.option(
    "--from-checkpoint",
    metavar="ID|latest|PATH",
    help="Begin with a checkpoint of the service, or one at a path, and not from nothing. With --cuts progress the "
    "recorded steps after it are computed again; any other input is read as what comes next, and a series goes on "
    "where topic, partition and key are the same (files are partition 0 of the first of source.topics).",
)
@click.option(
    "--checkpoint-to",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep checkpoints in this directory, every checkpoint.every and at the end.",
)
@click.option(
    "--resume", is_flag=True, help="Go on from the newest checkpoint in --checkpoint-to, as if never interrupted."
)
@click.option("--strict", is_flag=True, help="Exit 65 when a record could not be used, or a digest differs.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def replay(
    loaded: "Loaded",
    *,
    sources: tuple[str, ...],
    start: str | None,
    end: str | None,
    rows: int | None,
    score_from: int,
    standardise: int | None,
    cuts: str | None,
    out: Path | None,
    dead_letters: Path | None,
    from_checkpoint: str | None,
    checkpoint_to: Path | None,
    resume: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """
    Forecast history and score it.

    Starts from nothing, or from a checkpoint, and touches no state of the service. Every forecast is scored when its
    truth arrives, and before anything is learnt from it.

    With --checkpoint-to, a replay that was killed goes on with --resume and ends in the same bytes: forecasts, dead
    letters, scores and weights. Say --resume from the first start on: where there is no checkpoint it begins.
    """
    # Imported here, because it loads torch, which takes longer than a help text may.
    from streamlstm.cli.asked import Asked  # noqa: PLC0415, because of the line above
    from streamlstm.cli.replaying import replay_history  # noqa: PLC0415, because of the line above

    asked = Asked(
        sources,
        start,
        end,
        rows,
        score_from,
        standardise,
        recorded=cuts is not None,
        out=out,
        dead_letters=dead_letters,
        strict=strict,
        from_checkpoint=from_checkpoint,
        checkpoint_to=checkpoint_to,
        resume=resume,
    )
    for line in replay_history(loaded.config, asked, as_json=as_json):
        click.echo(line)
    if loaded.config.source.type == "kafka":
        suggest(f"streamlstm run -c {loaded.file}")
    else:
        suggest(f"streamlstm config show -c {loaded.file} --origin")
