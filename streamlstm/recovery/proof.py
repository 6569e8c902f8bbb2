"""
The proof: the recorded steps computed again from a stored state, and every digest compared with what was committed.

Nothing is published, written or locked: it reads the store, the chain and the input, also while the service runs. What
is compared is all that the chain says (the digest of what each step gave) and all that the store says (weights,
training and series of each generation that lies on the way).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from streamlstm.config.keys import tell_changes
from streamlstm.errors import CheckpointError, ConfigError, LogGap, ProgressError
from streamlstm.records.batch import Cut, Messages
from streamlstm.recovery.checkpoint import CheckpointStore, Refused
from streamlstm.recovery.fingerprint import Fingerprint, compare_fingerprints
from streamlstm.recovery.generations import Loaded
from streamlstm.recovery.joining import Computed, compute_together, join_steps
from streamlstm.recovery.making import EngineMaker, Steppable
from streamlstm.recovery.progress import Chain, RecordedStep
from streamlstm.recovery.provenance import Generation, Settings
from streamlstm.recovery.resume import Decode, seek_to_replay
from streamlstm.recovery.segments import Segments
from streamlstm.recovery.standing import steps_on, why_not_on
from streamlstm.transport.interfaces import LiveSource


@dataclass(frozen=True, slots=True)
class Bench:
    """What computing again takes: where states and input come from, and how an engine is made of a state."""

    store: CheckpointStore
    source: LiveSource
    decode: Decode
    maker: EngineMaker
    settings: Settings
    read_timeout_s: float


class Mismatch(NamedTuple):
    """Where something came out otherwise: the step, its cut, and whether its outputs or the state after it differ."""

    step: int
    what: Literal["outputs", "weights", "training", "series"]
    cut: Cut


@dataclass(slots=True)
class Verdict:
    """
    What was compared, and what came out otherwise, the first of it in ``first``.

    ``steps`` were computed after that of ``start``, up to ``last``; ``compared`` of them had a digest that counts.
    ``states`` are the generations on the way that the state agreed with or not, ``passed`` those that were bad.
    """

    start: int
    last: int
    steps: int = 0
    compared: int = 0
    messages: int = 0
    records: int = 0
    updates: int = 0
    states: list[int] = field(default_factory=list[int])
    passed: list[Refused] = field(default_factory=list[Refused])
    differing_steps: int = 0
    differing_states: int = 0
    first: Mismatch | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return self.first is None

    def differs(self, mismatch: Mismatch) -> None:
        """One more."""
        if mismatch.what == "outputs":
            self.differing_steps += 1
        else:
            self.differing_states += 1
        self.first = self.first or mismatch


def find_start(store: CheckpointStore, chain: Chain, step: int) -> Generation:
    """
    The newest generation of this step or an earlier one that the chain goes on from.

    Raises :class:`~streamlstm.errors.CheckpointError` when there is none, or what the chain had against the newest, and
    :class:`~streamlstm.errors.ProgressError` when the chain ends before this step.
    """
    refused: ProgressError | None = None
    for candidate in reversed([there for there in store.steps() if there <= step]):
        try:
            generation = store.verify(candidate)
            if why_not_on(chain, generation) is not None:
                continue
        except (CheckpointError, OSError):
            continue
        except ProgressError as error:
            refused = refused or error
            continue
        if step > chain.last_step:
            raise ProgressError(f"there is no step {step} to begin with: the chain ends with step {chain.last_step}")
        return generation
    if refused is not None:
        raise refused
    there = ", ".join(map(str, store.steps())) or "none"
    raise CheckpointError(
        f"no checkpoint in {store.name} of step {step} or before it can be gone on from; there is: {there}"
    )


def nothing_compared(verdict: Verdict, chain: Chain) -> str:
    """Why a verdict says nothing, in words; empty when something was compared."""
    if verdict.compared or verdict.states or verdict.differing_states:
        return ""
    if verdict.steps:
        return "nothing was compared: none of these steps has a digest that counts, and no checkpoint lies on the way"
    if verdict.last == chain.last_step:
        return f"nothing was compared: the chain ends with step {chain.last_step}"
    return f"nothing was compared: the checkpoint is of step {verdict.start} itself"


def expected_differences(chain: Chain, generation: Generation, last: int, here: Fingerprint) -> list[str]:
    """
    Why other bits are to be expected, in words; empty when they are not.

    Steps made on another machine, or a process in between that went on with other bits than were recorded.
    """
    told = list(compare_fingerprints(generation.provenance.fingerprint, here))
    steps = [step for step in chain.after(generation.step) if step.number <= last]
    for ident in dict.fromkeys(step.incarnation for step in steps):
        maker = chain.incarnation(ident)
        told += compare_fingerprints(maker.fingerprint, here) if maker else []
    for _, taken_over in chain.incarnations:
        if taken_over.rebased and generation.step < taken_over.checkpoint and taken_over.after < last:
            told.append(
                f"the process that took over after step {taken_over.after} had gone on from the checkpoint of step "
                f"{taken_over.checkpoint} with other bits; what it did can be proven from there"
            )
    return list(dict.fromkeys(told))


def prove(
    bench: Bench, chain: Chain, generation: Generation, last: int, each: Callable[[Verdict], None] = lambda _: None
) -> Verdict:
    """
    Compute the recorded steps up to ``last`` again from this generation, and compare; ``each`` is told after each step.

    Raises :class:`~streamlstm.errors.ProgressError` when the chain does not reach back to the generation, and
    :class:`~streamlstm.errors.LogGap` when the input does not.
    """
    loaded = bench.store.load(generation.step)
    verdict = Verdict(generation.step, last)
    on_the_way = {step for step in steps_on(chain, bench.store) if generation.step < step <= last}
    for engine, done in _recompute(bench, chain, loaded, last, on_the_way):
        verdict.steps += len(done.steps)
        verdict.messages += done.read
        verdict.records += sum(done.report.counts().values())
        verdict.updates += len(done.report.updates)
        for step, digest in zip(done.steps, done.digests, strict=True):
            verdict.compared += step.digest is not None
            if step.digest not in (None, digest):
                verdict.differs(Mismatch(step.number, "outputs", step.cut))
        if done.steps[-1].number in on_the_way:
            _compare_state(bench.store, engine, done.steps[-1], verdict)
        each(verdict)
    return verdict


def _recompute(
    bench: Bench, chain: Chain, loaded: Loaded, last: int, ends: set[int]
) -> Iterator[tuple[Steppable, Computed]]:
    """The recorded steps after a generation, in order, up to ``last``; the engine as it is after each of ``ends``."""
    generation = loaded.generation
    made = generation.provenance
    steps = [step for step in chain.to_replay(generation.step) if step.number <= last]
    if steps and steps[0].number != generation.step + 1:
        raise ProgressError(
            f"the chain goes on with step {steps[0].number}, but the checkpoint is of step {generation.step}: it was "
            "trimmed (sink.progress.trim: false keeps all)"
        )
    _check_settings(made.settings.identity, bench.settings.identity)
    excluded = chain.excluded_after(made.excluded)
    segments = Segments(bench.maker, chain, loaded)
    del loaded  # the engine has its own copy
    seek_to_replay(bench.source, chain, generation, excluded)

    def read(cut: Cut) -> Messages:
        try:
            return bench.source.read(cut, bench.read_timeout_s)
        except LogGap as error:
            # What the source advises is for who goes on, not for who only looks.
            told = "; ".join(f"{topic}-{part}: {start} to {end - 1}" for topic, part, start, end in error.gaps)
            raise LogGap(
                f"the input of recorded steps after {generation.step} is no longer retained ({told or error}), so they "
                "cannot be computed again; begin at a later step",
                error.gaps,
            ) from error

    for joined in join_steps(steps, ends):
        engine = segments.engine_for(joined[0])
        yield engine, compute_together(engine, joined, read, bench.decode, excluded)


def _check_settings(then: Mapping[str, object], now: Mapping[str, object]) -> None:
    if told := tell_changes(then, now):
        raise ConfigError(f"{told}; the steps can be computed again only as they were: set them back")


def _compare_state(store: CheckpointStore, engine: Steppable, step: RecordedStep, verdict: Verdict) -> None:
    try:
        stored = store.load(step.number).state.digests()
    except (CheckpointError, OSError) as error:
        if step.number in store.steps():  # else it was pruned meanwhile
            verdict.passed.append(Refused(step.number, str(error)))
        return
    verdict.states.append(step.number)
    computed = engine.state().digests()
    for what in ("weights", "training", "series"):
        if stored[what] != computed[what]:
            verdict.differs(Mismatch(step.number, what, step.cut))
            return
