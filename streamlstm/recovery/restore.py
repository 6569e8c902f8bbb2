"""
Going back: the next start takes a generation of the operator's choice.

A start takes the newest one that is whole, so nothing is pointed at: newer ones are put aside, the newest first, under
names they can be brought back by. Killed in between, it leaves a store from which every start ends in the same state,
only from a nearer or a farther generation; the same command again finishes it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from streamlstm.config.keys import tell_changes
from streamlstm.errors import CheckpointError, ConfigError
from streamlstm.recovery.archive import open_outside
from streamlstm.recovery.checkpoint import CheckpointStore
from streamlstm.recovery.generations import verify_generation
from streamlstm.recovery.inspection import blaming, step_of
from streamlstm.recovery.place import step_of_bad
from streamlstm.recovery.provenance import Generation, Settings


class Moved(NamedTuple):
    """A generation that left its place, and what it is called now (in a rehearsal: nothing)."""

    step: int
    name: str


@dataclass(frozen=True, slots=True)
class Restored:
    """What was done, or would be: ``generation`` is what the next start takes, ``source`` where it was."""

    generation: Generation
    source: Literal["store", "aside", "path"]
    put_aside: tuple[Moved, ...]


@dataclass(frozen=True, slots=True)
class Rules:
    """
    What a generation must be, to be gone back to: of this configuration, and of the run that the store holds.

    ``trims``: the chain is kept from the oldest generation in the store on, so from an older one nothing could be
    replayed.
    """

    now: Settings
    trims: bool


def restore(store: CheckpointStore, what: str, rules: Rules, *, dry_run: bool) -> Restored:
    """
    Make ``what`` the generation that the next start takes: a step, ``latest``, the name of one that was put aside, or
    the path of an archive or of a copied directory.

    Every byte of it is checked first. Raises :class:`~streamlstm.errors.CheckpointError` (65),
    :class:`~streamlstm.errors.ConfigError` (78), or :class:`~streamlstm.errors.Temporary` (75) while a service runs.
    ``dry_run`` changes nothing, and needs no lock.
    """
    aside = what in store.bad()
    outside = not aside and not what.isdigit() and Path(what).exists()
    step = 0 if aside or outside else step_of(store, what)  # asked before a directory is made for a mistyped one
    if not dry_run:
        store.open()
    if outside:
        generation, first = _take_in(store, what, rules, dry_run=dry_run)
        return Restored(generation, "path", first + _put_newer_aside(store, generation.step, dry_run=dry_run))
    if aside:
        generation, first = _bring_back(store, what, rules, dry_run=dry_run)
        return Restored(generation, "aside", first + _put_newer_aside(store, generation.step, dry_run=dry_run))
    with blaming(f"the checkpoint of step {step} in {store.name}"):
        generation = store.load(step).generation
    _check(store, generation, rules, what)
    return Restored(generation, "store", _put_newer_aside(store, step, dry_run=dry_run))


def _take_in(store: CheckpointStore, what: str, rules: Rules, *, dry_run: bool) -> tuple[Generation, tuple[Moved, ...]]:
    with open_outside(Path(what)) as outside:
        with blaming(what):
            generation = verify_generation(outside.files, outside.step)
        _check(store, generation, rules, what)
        if _is_there(store, generation):
            return generation, ()
        moved = _make_way(store, generation.step, dry_run=dry_run)
        if not dry_run:
            store.take_in(outside.files, outside.step)
    return generation, moved


def _bring_back(
    store: CheckpointStore, what: str, rules: Rules, *, dry_run: bool
) -> tuple[Generation, tuple[Moved, ...]]:
    with blaming(f"{what} in {store.name}"):
        generation = store.verify_bad(what)
    _check(store, generation, rules, what)
    moved = _make_way(store, generation.step, dry_run=dry_run)
    if not dry_run:
        store.bring_back(what)
    return generation, moved


def _make_way(store: CheckpointStore, step: int, *, dry_run: bool) -> tuple[Moved, ...]:
    """Another generation of the same step is kept aside."""
    if step not in store.steps():
        return ()
    return (Moved(step, "" if dry_run else store.put_aside(step)),)


def _is_there(store: CheckpointStore, generation: Generation) -> bool:
    """Whether the same bytes are in their place already."""
    try:
        return generation.step in store.steps() and store.verify(generation.step).digest == generation.digest
    except CheckpointError:
        return False


def _put_newer_aside(store: CheckpointStore, step: int, *, dry_run: bool) -> tuple[Moved, ...]:
    newer = [other for other in reversed(store.steps()) if other > step]
    return tuple(Moved(other, "" if dry_run else store.put_aside(other)) for other in newer)


def _check(store: CheckpointStore, generation: Generation, rules: Rules, what: str) -> None:
    """Refuse what the next start would refuse, as far as it can be told without a broker."""
    made = generation.provenance
    here = f"the checkpoint of step {generation.step}"
    if made.settings.name != rules.now.name:
        raise CheckpointError(f"{here} is of the deployment {made.settings.name!r}, and this one is {rules.now.name!r}")
    lineages = _lineages(store)
    if lineages and made.lineage not in lineages:
        raise CheckpointError(
            f"{here} is of run {made.lineage}, and those in {store.name} are of {', '.join(sorted(lineages))}"
        )
    told = tell_changes(made.settings.identity, rules.now.identity)
    if told and generation.step > 0:
        raise ConfigError(f"since {here} {told}; set them back first")
    oldest = min(store.steps(), default=generation.step)
    # An earlier attempt that was killed may have made way for it.
    made_way = any(step_of_bad(name) == generation.step for name in store.bad() if name != what)
    if rules.trims and generation.step < oldest and not made_way:
        raise CheckpointError(
            f"{here} is older than the oldest in {store.name}, of step {oldest}, and the progress log is trimmed "
            "up to that one (sink.progress.trim): nothing could be replayed"
        )


def _lineages(store: CheckpointStore) -> set[str]:
    """The runs of those in the store that can be read."""
    found: set[str] = set()
    for step in store.steps():
        try:
            found.add(store.header(step).generation.provenance.lineage)
        except (CheckpointError, OSError):
            continue
    return found
