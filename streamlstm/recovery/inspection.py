"""
What an operator asks of stored generations: which are there, which one a start would take, what is in one of them.

Reads only, without the lock, so beside a running service: a generation may be pruned while it is looked at.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

from streamlstm.config.keys import changed
from streamlstm.errors import CheckpointError
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.fingerprint import Fingerprint, compare_fingerprints
from streamlstm.recovery.generations import Header, Loaded
from streamlstm.recovery.manifest import MANIFEST, NewerSchema
from streamlstm.recovery.place import step_of_bad
from streamlstm.recovery.progress import Value
from streamlstm.recovery.provenance import Generation, Settings

LATEST = "latest"


@dataclass(frozen=True, slots=True)
class Listed:
    """
    One generation in a store, whole (``generation``) or not (``reason``).

    ``aside`` is the name it was put aside under, empty for one in its place. ``next`` marks the one that a start takes,
    unless the progress chain does not know it.
    """

    step: int
    generation: Generation | None
    reason: str
    aside: str = ""
    next: bool = False


@dataclass(frozen=True, slots=True)
class ChangedKey:
    """A configuration key that a state was made under with another value. An absent one is ``None``."""

    key: str
    kind: Literal["identity", "learning"]
    then: Value
    now: Value


def list_generations(store: CheckpointStore) -> list[Listed]:
    """Every generation, oldest first, then those that were put aside; every byte of each was checked."""
    rows = [row for step in store.steps() if (row := _look(store, step)) is not None]
    for i in range(len(rows) - 1, -1, -1):
        if rows[i].generation is not None:
            rows[i] = Listed(rows[i].step, rows[i].generation, "", next=True)
            break
    return rows + [row for name in store.bad() if (row := _look_aside(store, name)) is not None]


def none_there(store: CheckpointStore) -> str:
    """What to say of a store without a generation. A directory that does not exist may be a mistyped one."""
    if store.directory is not None and not store.directory.exists():
        return f"no checkpoint: {store.name} does not exist; is {store.setting} right?"
    return f"no checkpoint in {store.name}"


def step_of(store: CheckpointStore, ident: str) -> int:
    """
    The step that an operator means by a number or ``latest``: the newest that is there, whole or not.

    Raises :class:`~streamlstm.errors.CheckpointError` when there is none, naming those that are.
    """
    steps = store.steps()
    if not steps:
        raise CheckpointError(none_there(store))
    if ident == LATEST:
        return steps[-1]
    step = int(ident) if ident.isascii() and ident.isdigit() else None
    if step is None or step not in steps:
        there = ", ".join(map(str, steps))
        raise CheckpointError(f"there is no checkpoint {ident!r} in {store.name}; there is: {there} (or {LATEST})")
    return step


def load_of(store: CheckpointStore, ident: str) -> Loaded:
    """The state that an operator means, as in :func:`step_of`. One that is bad is named, with what to do."""
    step = step_of(store, ident)
    with blaming(f"the checkpoint of step {step} in {store.name}"):
        return store.load(step)


@contextmanager
def blaming(what: str) -> Generator[None, None, None]:
    """Say of an error in reading a generation which one it is, and what to do."""
    try:
        yield
    except NewerSchema as error:
        raise CheckpointError(f"{what}: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(
            f"{what} is bad: {error}; take another (`streamlstm checkpoint list` names what is there, "
            "`streamlstm checkpoint verify` checks them all)"
        ) from error


def changed_keys(then: Settings, now: Settings) -> list[ChangedKey]:
    """How a state's configuration differs from another one."""
    identity = changed(then.identity, now.identity)
    learning = changed(then.learning, now.learning)
    return [
        *(ChangedKey(key, "identity", then.identity.get(key), now.identity.get(key)) for key in identity),
        *(ChangedKey(key, "learning", then.learning.get(key), now.learning.get(key)) for key in learning),
    ]


def describe(header: Header, now: Settings, here: Fingerprint) -> dict[str, Any]:
    """A generation as JSON values: all that its two JSON files say, and what of it differs from here and now."""
    generation, files = header.generation, {name: entry.bytes for name, entry in sorted(header.manifest.files.items())}
    made = generation.provenance
    state = cast("dict[str, Any]", header.raw["state"])
    queue = state.get("queue")
    differences = compare_fingerprints(made.fingerprint, here)
    all_series = generation.series + generation.stored
    return {
        "step": generation.step,
        "digest": generation.digest,
        "created_ms": made.created_ms,
        "name": made.settings.name,
        "lineage": made.lineage,
        "revision": made.revision,
        "incarnation": made.incarnation,
        "progress": made.progress._asdict() if made.progress else None,
        "positions": [p._asdict() for p in made.positions],
        "excluded": [r._asdict() for r in made.excluded],
        "topic_ids": dict(made.topic_ids),
        "config": {
            "hash": made.settings.hash,
            "differs": [
                {"key": c.key, "class": c.kind, "then": c.then, "now": c.now} for c in changed_keys(made.settings, now)
            ],
        },
        "fingerprint": dict(made.fingerprint),
        "fingerprint_differs": differences,
        "bits_match": not differences,
        "series": generation.series,
        "series_stored": generation.stored,
        "bytes": generation.bytes,
        "bytes_per_series": round(_series_bytes(files) / all_series, 1) if all_series else None,
        "counters": counters_of(state),
        "queued_windows": len(queue["series"]) if isinstance(queue, dict) and "series" in queue else None,
        "files": {**files, MANIFEST: len(header.sealed)},
        "columns": {
            name: {"dtype": column.dtype, "shape": list(column.shape)} if column else None
            for name, column in sorted(header.meta.columns.items())
        },
    }


def counters_of(state: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """
    The single values in a state's meta, by dotted name.

    >>> counters_of({"fresh": 3, "learner": {"number": 2}, "queue": {"series": []}})
    {'fresh': 3, 'learner.number': 2}
    """
    found: dict[str, Value] = {}
    for name, value in sorted(state.items()):
        if isinstance(value, Mapping):
            found |= counters_of(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, bool | int | float | str):
            found[f"{prefix}{name}"] = value
    return found


def _series_bytes(files: Mapping[str, int]) -> int:
    return sum(size for name, size in files.items() if name.endswith(".parquet"))


def _look(store: CheckpointStore, step: int) -> Listed | None:
    """``None`` for one that was pruned while we looked."""
    try:
        return Listed(step, store.verify(step), "")
    except (CheckpointError, OSError) as error:
        return Listed(step, None, str(error)) if step in store.steps() else None


def _look_aside(store: CheckpointStore, name: str) -> Listed | None:
    try:
        return Listed(step_of_bad(name), store.verify_bad(name), "", aside=name)
    except (CheckpointError, OSError) as error:
        return Listed(step_of_bad(name), None, str(error), aside=name) if name in store.bad() else None
