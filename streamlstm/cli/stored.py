"""What ``streamlstm checkpoint`` does and prints. Apart from the commands, because it loads torch."""

import json
import math
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from streamlstm.cli.device import prepare_device
from streamlstm.cli.options import suggest
from streamlstm.config.load import Loaded
from streamlstm.config.model import Config
from streamlstm.errors import CheckpointError, CheckpointNotWritten, Temporary
from streamlstm.recovery.archive import export as write_archive
from streamlstm.recovery.archive import load_outside, open_outside
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.difference import Difference, TensorDifference, compare
from streamlstm.recovery.fingerprint import take_fingerprint
from streamlstm.recovery.generations import Loaded as State
from streamlstm.recovery.inspection import Listed, blaming, describe, list_generations, load_of, none_there, step_of
from streamlstm.recovery.place import name_of
from streamlstm.recovery.provenance import Settings
from streamlstm.recovery.restore import Moved, Rules
from streamlstm.recovery.restore import restore as go_back

_SERIES = ("series", "series_stored")
"""Of a row: how many are in memory, and how many beyond."""

_SHORT = 8
_MOST_NAMED = 20


def open_for_reading(config: Config) -> CheckpointStore:
    """The deployment's store, not locked."""
    return open_store(config.checkpoint.url)


def list_all(loaded: Loaded, *, as_json: bool) -> None:
    """``checkpoint list``."""
    store = open_for_reading(loaded.config)
    listed = list_generations(store)
    rows = [_row(found, time.time()) for found in listed]
    here, aside = [r for r in rows if not r["aside"]], [r for r in rows if r["aside"]]
    if as_json:
        _say_json({"directory": store.name, "checkpoints": here, "put_aside": aside})
        return
    if not here:
        click.echo(none_there(store))
    if rows:
        _print_table(
            ("step", "time", "age", "bytes", "series", "stored", "deployment", "run", "revision", "state", "positions"),
            [_cells(row) for row in here + aside],
            right={"step", "age", "bytes", "series", "stored", "revision"},
        )
    if here:
        suggest(f"streamlstm checkpoint show latest -c {loaded.file}")


def show(loaded: Loaded, ident: str, *, as_json: bool) -> None:
    """``checkpoint show``."""
    store = open_for_reading(loaded.config)
    step = step_of(store, ident)
    with blaming(f"the checkpoint of step {step} in {store.name}"):
        store.verify(step)
    here = take_fingerprint(prepare_device(loaded.config), loaded.config.runtime.threads)
    told = describe(store.header(step), Settings.of(loaded.config), here)
    told["time"] = _time(told.pop("created_ms"))
    if as_json:
        _say_json(told)
        return
    _print_facts(told)
    suggest(f"streamlstm checkpoint verify {told['step']} -c {loaded.file}")


def verify(loaded: Loaded, ident: str | None, *, as_json: bool) -> None:
    """``checkpoint verify``: raises :class:`~streamlstm.errors.CheckpointError` where there is none, or a bad one."""
    store = open_for_reading(loaded.config)
    steps = store.steps() if ident is None else [step_of(store, ident)]
    rows: list[dict[str, Any]] = []
    for step in steps:
        began = time.perf_counter()
        try:
            generation = store.load(step).generation
        except (CheckpointError, OSError) as error:
            if step in store.steps():  # else it was pruned meanwhile
                rows.append({"step": step, "valid": False, "reason": str(error)})
            continue
        spent = time.perf_counter() - began
        rows.append(
            {
                "step": step,
                "valid": True,
                "bytes": generation.bytes,
                "series": generation.series,
                "series_stored": generation.stored,
                "seconds": spent,
            }
        )
    bad = [row for row in rows if not row["valid"]]
    if as_json:
        _say_json({"directory": store.name, "checkpoints": rows, "bad": len(bad)})
    elif rows:
        cells = [
            (str(r["step"]), *(f"{r[k]:,}" for k in ("bytes", *_SERIES)), f"{r['seconds']:.2f}", "whole")
            if r["valid"]
            else (str(r["step"]), *[""] * 4, f"BAD: {r['reason']}")
            for r in rows
        ]
        _print_table(
            ("step", "bytes", "series", "stored", "seconds", "verdict"),
            cells,
            right={"step", "bytes", "series", "stored", "seconds"},
        )
    if bad:
        told = "; ".join(f"{row['step']}: {row['reason']}" for row in bad)
        raise CheckpointError(f"{len(bad)} of {len(rows)} checkpoints in {store.name} are bad: {told}")
    if steps and not rows:
        raise Temporary(f"all that was to be checked in {store.name} was pruned meanwhile; verify again")
    if not rows:
        raise CheckpointError(none_there(store))
    suggest(f"streamlstm verify -c {loaded.file} --from {rows[0]['step']}")


def diff(loaded: Loaded, a: str, b: str, *, as_json: bool) -> None:
    """``checkpoint diff``."""
    store = open_for_reading(loaded.config)
    with ExitStack() as stack:
        found = compare(*(stack.enter_context(_open(store, ident)) for ident in (a, b)))
    if as_json:
        _say_json(_finite(asdict(found)))
        return
    _print_difference(found, a, b)
    suggest(f"streamlstm checkpoint show {b} -c {loaded.file}")


def restore(loaded: Loaded, what: str, *, dry_run: bool, as_json: bool) -> None:
    """``checkpoint restore``."""
    store = open_for_reading(loaded.config)
    rules = Rules(Settings.of(loaded.config), trims=loaded.config.sink.progress.trim)
    with ExitStack() as stack:
        stack.callback(store.leave)
        done = go_back(store, what, rules, dry_run=dry_run)
    step = done.generation.step
    if as_json:
        _say_json(
            {
                "step": step,
                "source": done.source,
                "put_aside": [moved._asdict() for moved in done.put_aside],
                "dry_run": dry_run,
            }
        )
        return
    would = "would be " if dry_run else ""
    if done.source != "store":
        click.echo(f"{would}brought {'in' if done.source == 'path' else 'back'}: {what}, step {step}")
    for moved in done.put_aside:
        click.echo(_told_moved(moved, dry_run=dry_run))
    click.echo(
        f"the next start {'would take' if dry_run else 'takes'} the checkpoint of step {step} and compute"
        f"{'' if dry_run else 's'} the recorded steps after it again: the same bits, nothing published twice"
    )
    again = f"streamlstm checkpoint restore {what} -c {loaded.file}"
    suggest(again if dry_run else f"streamlstm run -c {loaded.file}")


def prune(loaded: Loaded, *, dry_run: bool, as_json: bool) -> None:
    """``checkpoint prune``: raises :class:`~streamlstm.errors.CheckpointNotWritten` when something could not go."""
    store = open_for_reading(loaded.config)
    keep = Keep(loaded.config.checkpoint.keep.last, loaded.config.checkpoint.keep.daily)
    with ExitStack() as stack:
        stack.callback(store.leave)
        if not dry_run and store.steps():
            store.open()
        going = store.surplus(keep)
        leftover = "" if dry_run else store.prune(keep)
        stays = store.steps()
    if dry_run:
        stays = [step for step in stays if name_of(step) not in going]
    gone = [name for name in going if dry_run or name not in {*map(name_of, stays), *store.bad()}]
    if as_json:
        _say_json({"removed": gone, "kept": stays, "dry_run": dry_run})
    else:
        for name in gone:
            click.echo(f"{'would be ' if dry_run else ''}removed: {name}")
        click.echo(f"kept: {', '.join(map(str, stays)) or 'nothing was there'}")
    if leftover:
        raise CheckpointNotWritten(leftover)
    suggest(f"streamlstm checkpoint {'prune' if dry_run else 'list'} -c {loaded.file}")


def export(loaded: Loaded, ident: str, out: Path) -> None:
    """``checkpoint export``."""
    store = open_for_reading(loaded.config)
    step = step_of(store, ident)
    try:
        with blaming(f"the checkpoint of step {step} in {store.name}"):
            generation = write_archive(store, step, out)
    except FileExistsError as error:
        raise click.BadParameter(f"{out} exists: name another file, or remove it", param_hint="--out") from error
    click.echo(f"{out}: the checkpoint of step {generation.step}, {out.stat().st_size:,} bytes, read back and whole")
    suggest(f"streamlstm checkpoint restore {out} -c {loaded.file} --dry-run")


@contextmanager
def _open(store: CheckpointStore, ident: str) -> Generator[State]:
    """By ID, or from a path; what is beyond memory is read while it is open."""
    if not ident.isdigit() and Path(ident).exists():
        with open_outside(Path(ident)) as outside:
            yield load_outside(outside, ident)
    else:
        yield load_of(store, ident)


def _row(found: Listed, now_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {"step": found.step, "valid": found.generation is not None, "aside": found.aside}
    if found.generation is None:
        return {**row, "next": False, "reason": found.reason}
    made = found.generation.provenance
    return {
        **row,
        "next": found.next,
        "time": _time(made.created_ms),
        "age_s": round(max(0.0, now_s - made.created_ms / 1000)),
        "bytes": found.generation.bytes,
        "series": found.generation.series,
        "series_stored": found.generation.stored,
        "name": made.settings.name,
        "lineage": made.lineage,
        "revision": made.revision,
        "config": made.settings.hash[:_SHORT],
        "positions": [p._asdict() for p in made.positions],
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    state = "whole, newest" if row["next"] else "whole" if row["valid"] else f"BAD: {row['reason']}"
    if row["aside"]:
        state = f"put aside as {row['aside']}: {state}"
    if not row["valid"]:
        return (str(row["step"]), *[""] * 8, state, "")
    where = " ".join(f"{p['topic']}-{p['partition']}@{p['next_offset']}" for p in row["positions"])
    size = [f"{row[k]:,}" for k in ("bytes", *_SERIES)]
    run = (row["name"], row["lineage"][:_SHORT], str(row["revision"]))
    return (str(row["step"]), row["time"], _age(row["age_s"]), *size, *run, state, where)


def _told_moved(moved: Moved, *, dry_run: bool) -> str:
    return f"would be put aside: step {moved.step}" if dry_run else f"put aside: step {moved.step}, now {moved.name}"


def _print_facts(told: dict[str, Any]) -> None:
    """A generation, a fact a line."""
    progress, config = told["progress"], told["config"]
    click.echo(f"checkpoint of step {told['step']}, made {told['time']}")
    click.echo(f"  deployment   {told['name']}, incarnation {told['incarnation'] or 'none yet'}")
    click.echo(f"  run          {told['lineage']}, revision {told['revision']}")
    for r in told["excluded"]:
        click.echo(f"  excluded     {r['topic']}-{r['partition']}, offsets {r['start']} to {r['end'] - 1}")
    stands = f"progress offset {progress['offset']}" if progress else "nothing: it precedes the chain"
    click.echo(f"  stands on    {stands}")
    click.echo(
        f"  content      {told['series']:,} series in memory, {told['series_stored']:,} stored, {told['bytes']:,} bytes"
        f"{_each(told['bytes_per_series'])}"
    )
    click.echo(f"  counters     {', '.join(f'{name} {value}' for name, value in told['counters'].items()) or 'none'}")
    if told["queued_windows"] is not None:
        click.echo(f"  queue        {told['queued_windows']} windows wait for the next update")
    click.echo(
        f"  config       {config['hash'][:_SHORT]}: {'as it is now' if not config['differs'] else 'differs from now'}"
    )
    for key in config["differs"]:
        click.echo(f"    {key['class']:<9}  {key['key']} was {json.dumps(key['then'])}, is {json.dumps(key['now'])}")
    click.echo(f"  machine      {'bits can be expected to match here' if told['bits_match'] else 'other bits here:'}")
    for difference in told["fingerprint_differs"]:
        click.echo(f"    {difference}")
    click.echo("  positions")
    for p in told["positions"]:
        ident = told["topic_ids"].get(p["topic"], "unknown")
        click.echo(f"    {p['topic']}-{p['partition']}  next offset {p['next_offset']:,}  topic id {ident}")
    click.echo("  files")
    width = max(map(len, told["files"]))
    for name, size in told["files"].items():
        click.echo(f"    {name:<{width}}  {size:>14,}")
    click.echo("  columns of a series")
    width = max(map(len, told["columns"]), default=0)
    for name, column in told["columns"].items():
        shape = f"{column['dtype']}{column['shape']}" if column else "no rows yet"
        click.echo(f"    {name:<{width}}  {shape}")


def _each(bytes_per_series: float | None) -> str:
    return "" if bytes_per_series is None else f", {bytes_per_series:,.0f} bytes a series"


def _print_difference(found: Difference, a: str, b: str) -> None:
    click.echo(f"{a} and {b}: {'the same bits' if found.equal else 'the states differ'}")
    _print_lines("made by", (f"{p.name}: {p.a} -> {p.b}" for p in found.provenance))
    _print_lines("positions", (f"{p.name}: {p.a} -> {p.b}" for p in found.positions))
    _print_lines("counters", (f"{p.name}: {p.a} -> {p.b}" for p in found.counters))
    _print_lines("config", (f"{c.key} ({c.kind}): {json.dumps(c.then)} -> {json.dumps(c.now)}" for c in found.config))
    _print_lines("machine", found.fingerprint)
    _print_lines("weights", map(_told_tensor, found.weights), "equal")
    _print_lines("training", map(_told_tensor, found.training), "equal")
    series = found.series
    counts = {
        "equal": series.same,
        "changed": len(series.changed),
        "added": len(series.added),
        "gone": len(series.gone),
    }
    click.echo(f"  series: {', '.join(f'{count:,} {what}' for what, count in counts.items())}")
    for what, pair in (("in memory", series.in_memory), ("stored", series.stored)):
        click.echo(f"    {what}: {pair.a:,} -> {pair.b:,}")
    for what, names in (("added", series.added), ("gone", series.gone)):
        for ident in names[:_MOST_NAMED]:
            click.echo(f"    {what}: {ident.topic}-{ident.partition} {ident.key}")
        if len(names) > _MOST_NAMED:
            click.echo(f"    and {len(names) - _MOST_NAMED:,} more {what}; --json has them all")
    for name, count in series.columns.items():
        click.echo(f"    column {name}: {count:,} series differ")
    for name in series.only:
        click.echo(f"    column {name}: only one of the two has it, or in another shape")


def _print_lines(heading: str, lines: Iterable[str], otherwise: str = "") -> None:
    told = list(lines)
    if told or otherwise:
        click.echo(f"  {heading}:{'' if told else f' {otherwise}'}")
    for line in told:
        click.echo(f"    {line}")


def _told_tensor(found: TensorDifference) -> str:
    if found.elements is None:
        return f"{found.name}: {found.a or 'not there'} -> {found.b or 'not there'}"
    return f"{found.name}: {found.elements:,} elements of {found.a} differ, by at most {found.max_abs:g}"


def _print_table(names: Sequence[str], rows: Iterable[Sequence[str]], right: set[str]) -> None:
    """Never folded, and no cell is empty: to be read by people and by ``awk``."""
    lines = [names, *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(names, line, widths, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def _say_json(told: object) -> None:
    click.echo(json.dumps(told, indent=2))


def _finite(value: Any) -> Any:  # noqa: ANN401, because it is any JSON
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _age(seconds: int) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{seconds}s"
