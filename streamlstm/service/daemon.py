"""
The loop: poll → decode → ``engine.step`` → publish(forecasts, dead letters, progress) → observe → if due: snapshot →
checkpoint in the background.

Several steps share a transaction until it has been open for ``commit_every_s`` or is full. A snapshot is taken between
transactions only, so that a checkpoint never holds a step that was not committed. Nothing here repairs state: any
doubt ends the process, and the next start takes up what was committed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from streamlstm.engine.report import StepReport
from streamlstm.errors import CheckpointNotWritten, LogGap, StreamlstmError, Temporary, Unavailable
from streamlstm.records.batch import Cut, Messages, Range
from streamlstm.records.decode import refuse_rejected
from streamlstm.recovery.background import BackgroundWriter, Failed, Kept, Outcome
from streamlstm.recovery.checkpoint import Refused
from streamlstm.recovery.exclusions import drop_excluded
from streamlstm.recovery.fingerprint import ROWS, Fingerprint
from streamlstm.recovery.progress import Gap, Link, digest_record, encode_record, positions_after, record_steps
from streamlstm.recovery.provenance import Provenance
from streamlstm.recovery.repetition import Repeated
from streamlstm.recovery.resume import Ready, Terms, World
from streamlstm.recovery.standing import judge_fenced
from streamlstm.service.observer import Checkpointed, Committed, Observer, Resumed, StepTimings
from streamlstm.service.stopping import Stop
from streamlstm.transport.interfaces import Fenced, OutMessage, Outputs

MAX_OUTPUT_BYTES = 16 << 20
MAX_OUTPUT_MESSAGES = 20_000
MAX_RANGES = 4096
"""
A transaction with this much in it is committed at once, so that memory and a progress record stay bounded.

It is asked after each step, so a transaction exceeds this by one step at most. A step is one cut, which the source
bounds (about 1 MiB of messages), and a message gives no more than ``decode.max_rows`` records.
"""

MAX_REPLAY_FACTOR = 10
"""How many times ``checkpoint.every.records`` may be consumed while no checkpoint is durable."""

_MEND = "mend or empty what is under checkpoint.url, then start again: nothing is lost"
_LAG_EVERY_S = 1.0
_RETRY_POLL_S = 0.5


class Log(Protocol):
    """Of structlog, what is used here."""

    def info(self, event: str, **facts: object) -> object:
        """What an operator may want to know."""
        ...

    def warning(self, event: str, **facts: object) -> object:
        """What an operator should look at."""
        ...

    def error(self, event: str, **facts: object) -> object:
        """What an operator must mend."""
        ...


class Encode(Protocol):
    """From facts to messages."""

    def encode_forecasts(self, report: StepReport) -> Sequence[OutMessage]:
        """One message per forecast."""
        ...

    def encode_dead_letters(self, report: StepReport, messages: Messages) -> Sequence[OutMessage]:
        """One message per message with rejected rows."""
        ...


def encode_outputs(
    encode: Encode, report: StepReport, messages: Messages
) -> tuple[Sequence[OutMessage], Sequence[OutMessage]]:
    """The forecasts and dead letters of a step."""
    dead_letters = encode.encode_dead_letters(report, messages) if report.rejected else ()
    return encode.encode_forecasts(report), dead_letters


@dataclass(frozen=True, slots=True)
class Pace:
    """What the configuration says about the loop; durations in seconds."""

    max_records: int
    poll_timeout_s: float
    commit_every_s: float
    checkpoint_every_s: float
    checkpoint_every_records: int
    trim: bool
    trouble_limit_s: float
    shutdown_timeout_s: float
    fail_on_rejected: bool


@dataclass(slots=True)
class _Transaction:
    """Steps that were computed and are not committed yet, with their outputs."""

    opened_s: float = 0.0
    reports: list[StepReport] = field(default_factory=list[StepReport])
    forecasts: list[OutMessage] = field(default_factory=list[OutMessage])
    dead_letters: list[OutMessage] = field(default_factory=list[OutMessage])
    excluded: int = 0
    ranges: int = 0
    bytes: int = 0

    def add(
        self, report: StepReport, forecasts: Sequence[OutMessage], dead_letters: Sequence[OutMessage], excluded: int
    ) -> None:
        self.reports.append(report)
        self.excluded += excluded
        self.forecasts += forecasts
        self.dead_letters += dead_letters
        self.ranges += len(report.batch.cut)
        self.bytes += sum(len(m.key or b"") + len(m.value or b"") for m in (*forecasts, *dead_letters))

    def full(self) -> bool:
        messages = len(self.forecasts) + len(self.dead_letters)
        return self.bytes >= MAX_OUTPUT_BYTES or messages >= MAX_OUTPUT_MESSAGES or self.ranges >= MAX_RANGES

    def cuts(self) -> list[Cut]:
        return [report.batch.cut for report in self.reports]


@dataclass(slots=True)
class CheckpointSchedule:
    """
    When a checkpoint is due, by time and by records. Time comes in as an argument.

    >>> schedule = CheckpointSchedule(every_s=60, every_records=100, tried_s=0.0)
    >>> schedule.due(step=0, now_s=99.0), schedule.due(step=1, now_s=59.0), schedule.due(step=1, now_s=60.0)
    (False, False, True)
    >>> schedule.consumed(100)
    >>> schedule.due(step=2, now_s=1.0)
    True
    """

    every_s: float
    every_records: int
    tried_s: float
    durable_step: int = 0
    since_tried: int = 0
    since_durable: int = 0
    in_flight: int = 0

    def consumed(self, records: int) -> None:
        """So many more were consumed."""
        self.since_tried += records
        self.since_durable += records

    def due(self, step: int, now_s: float) -> bool:
        """Whether a snapshot should be taken at this step. Never without a new step."""
        late = now_s - self.tried_s >= self.every_s or self.since_tried >= self.every_records
        return step > self.durable_step and late

    def tried(self, now_s: float) -> None:
        """A snapshot was taken."""
        self.tried_s, self.since_tried, self.in_flight = now_s, 0, self.since_durable

    def kept(self, step: int) -> None:
        """The snapshot of this step is durable."""
        self.since_durable -= self.in_flight
        self.durable_step = step

    def too_far(self) -> bool:
        """Whether a restart would have to replay more than is sensible."""
        return self.since_durable >= MAX_REPLAY_FACTOR * self.every_records

    def hangs(self) -> bool:
        """
        Whether the snapshot in flight has been waited for long enough.

        It has at least until the next one would be due: after a long replay the first is taken when it is too far.
        """
        return self.too_far() and self.since_tried >= self.every_records


class Daemon:
    """The running service: one engine, its source, its publisher, its checkpoints. :meth:`run` until asked to stop."""

    def __init__(
        self,
        world: World,
        terms: Terms,
        ready: Ready,
        pace: Pace,
        encode: Encode,
        observer: Observer,
        log: Log,
        stop: Stop,
        writer: BackgroundWriter,
    ) -> None:
        self._world, self._terms, self._pace = world, terms, pace
        self._encode, self._observer, self._log, self._stop = encode, observer, log, stop
        self._now_s = world.monotonic_s
        self._engine, self._source = ready.engine, world.source
        self._lineage, self._incarnation = ready.lineage, ready.incarnation
        self._revision, self._excluded = ready.revision, ready.excluded
        self._topic_ids = ready.generation.provenance.topic_ids
        self._tip: Link = ready.tip
        self._positions = ready.positions
        self._open = _Transaction()
        self._writer = writer
        self._schedule = CheckpointSchedule(
            pace.checkpoint_every_s,
            pace.checkpoint_every_records,
            tried_s=self._now_s(),
            durable_step=ready.generation.step,
            since_tried=ready.replayed_records,
            since_durable=ready.replayed_records,
        )
        self._snapshot_s = 0.0
        self._trouble_since_s: float | None = None
        self._held_since_s: float | None = None
        self._lag_told_s = float("-inf")
        self._trims = pace.trim
        self._committed = False

    @property
    def committed(self) -> bool:
        """Whether anything was committed."""
        return self._committed

    def run(self) -> None:
        """Until asked to stop; then finish what was begun and leave a checkpoint."""
        self._observer.observe_phase("running")
        while not self._stop.requested:
            self.turn()
        self._observer.observe_phase("stopping")
        self._finish()

    def abandon(self) -> None:
        """
        Wait for the checkpoint in flight, which is as good as any: it holds committed steps only. The chain is left as
        it is: the session that may change it is over, and the next checkpoint trims as far.

        Raises :class:`~streamlstm.errors.Temporary` when it does not end.
        """
        self._trims = False
        outcome = self._writer.poll(self._pace.trouble_limit_s)
        if self._writer.busy:
            raise Temporary(f"the checkpoint in flight does not end within {self._pace.trouble_limit_s:g} s")
        self._heed_checkpoint(outcome)

    def turn(self) -> None:
        """One turn of the loop."""
        self._observer.observe_turn(self._now_s())
        began_s = self._now_s()
        messages = None if self._held_up() else self._poll()
        if messages is not None:
            self._step(messages, began_s)
        if self._commit_due():
            self._commit()
        self._heed_checkpoint(self._writer.poll())
        if self._checkpoint_due():
            self._snapshot()
        self._tell_lag()

    def _held_up(self) -> bool:
        """
        Whether nothing is to be read: too much would have to be replayed, and the checkpoint in flight takes its time.

        It is waited for, as long as the configuration says.
        """
        if not (self._writer.busy and self._schedule.hangs()):
            if self._held_since_s is not None:
                self._observer.observe_phase("running")
                self._log.info("the checkpoint in flight ended", waited_s=round(self._now_s() - self._held_since_s, 1))
                self._held_since_s = None
            return False
        records = self._schedule.since_durable
        if self._held_since_s is None:
            self._held_since_s = self._now_s()
            self._observer.observe_phase("waiting")
            self._log.warning("nothing is read until the checkpoint in flight ends", records_to_replay=records)
        if self._now_s() - self._held_since_s >= self._pace.trouble_limit_s:
            raise CheckpointNotWritten(
                f"the checkpoint in flight does not end: {records} records were consumed since the last one that is "
                "durable, too many to replay; look at the disk under checkpoint.url"
            )
        self._heed_checkpoint(self._writer.poll(self._wait_s()))
        return True

    def _wait_s(self) -> float:
        """How long the loop may wait for something at once."""
        if not self._open.reports:
            return self._pace.poll_timeout_s
        left_s = self._open.opened_s + self._pace.commit_every_s - self._now_s()
        return min(self._pace.poll_timeout_s, max(0.0, left_s))

    def _poll(self) -> Messages | None:
        """The next cut. A broker that is away is waited for, as long as the configuration says."""
        try:
            messages = self._source.poll(self._pace.max_records, self._wait_s())
        except LogGap as error:
            if self._terms.on_gap == "fail" or not self._pass_over(error):
                raise
            return None
        except (Temporary, Unavailable) as error:
            if self._trouble_since_s is None:
                self._trouble_since_s = self._now_s()
                self._observer.observe_phase("waiting")
                self._log.warning("the broker is away; waiting", error=str(error))
            if self._now_s() - self._trouble_since_s >= self._pace.trouble_limit_s:
                raise Temporary(f"the broker has been away for {self._pace.trouble_limit_s:g} s: {error}") from error
            self._stop.wait(_RETRY_POLL_S)
            return None
        if self._trouble_since_s is not None:
            self._observer.observe_phase("running")
            self._log.info("the broker is back", away_s=round(self._now_s() - self._trouble_since_s, 1))
            self._trouble_since_s = None
        return messages

    def _step(self, messages: Messages, began_s: float) -> None:
        """Compute one cut, and put what it gave into the transaction. What is excluded nobody looks into."""
        polled_s = self._now_s()
        messages, excluded = drop_excluded(messages, self._excluded)
        batch = self._world.decode(messages)
        if self._pace.fail_on_rejected:
            refuse_rejected(batch)
        decoded_s = self._now_s()
        report = self._engine.step(batch)
        stepped_s = self._now_s()
        if not self._open.reports:
            self._open.opened_s = stepped_s
        self._open.add(report, *encode_outputs(self._encode, report, messages), excluded)
        self._schedule.consumed(batch.consumed + excluded)
        timings = StepTimings(polled_s - began_s, decoded_s - polled_s, stepped_s - decoded_s)
        self._observer.observe_step(report, timings, _bytes_by_topic(messages))

    def _pass_over(self, error: LogGap) -> bool:
        """
        Record that what retention has deleted under us is passed over, and go on behind it. False if nothing may be.

        What was computed is committed first: the gap lies behind it.
        """
        if self._open.reports:
            self._commit()
        ends = {(topic, partition): end for topic, partition, _, end in error.gaps}
        ranges = tuple(
            Range(p.topic, p.partition, p.next_offset, end)
            for p in self._positions
            if (end := ends.get((p.topic, p.partition), 0)) > p.next_offset
        )
        if not ranges:
            return False
        step = self._engine.step_number
        gap = Gap(
            prev=self._tip.digest,
            lineage=self._lineage,
            revision=self._revision,
            incarnation=self._incarnation,
            after=step,
            checkpoint=step,
            ranges=ranges,
        )
        self._publish(Outputs([], [], encode_record(gap)))
        self._positions = positions_after(self._positions, [ranges])
        self._source.seek(self._positions)
        tell_gap(self._log, self._observer, ranges)
        return True

    def _commit_due(self) -> bool:
        if not self._open.reports:
            return False
        now_s = self._now_s()
        return (
            self._open.full()
            or now_s - self._open.opened_s >= self._pace.commit_every_s
            or (not self._writer.busy and self._schedule.due(self._engine.step_number, now_s))
        )

    def _commit(self) -> None:
        """Make the open transaction visible, with the record that chains it to what was committed before."""
        done, self._open = self._open, _Transaction()
        record = record_steps(
            self._tip,
            self._lineage,
            self._incarnation,
            done.reports[0].step,
            [(report.batch.cut, report.digest()) for report in done.reports],
            self._revision,
        )
        value = encode_record(record)
        began_s = self._now_s()
        self._publish(Outputs(done.forecasts, done.dead_letters, value))
        self._committed = True
        self._positions = positions_after(self._positions, done.cuts())
        self._observer.observe_commit(
            Committed(
                reports=done.reports,
                forecasts=len(done.forecasts),
                dead_letters=len(done.dead_letters),
                bytes=done.bytes + len(value),
                duration_s=self._now_s() - began_s,
                published_at_s=self._world.wall_s(),
                positions=self._positions,
                excluded=done.excluded,
            )
        )
        self._source.commit_group_offsets(self._positions)

    def _publish(self, outputs: Outputs) -> None:
        """Commit, and keep in mind what the next record must name."""
        try:
            offset = self._world.publisher.commit(outputs)
        except Fenced as error:
            self._observer.observe_commit_failed(str(error))
            raise judge_fenced(error, self._world.progress, self._tip, self._incarnation) from error
        except StreamlstmError as error:
            self._observer.observe_commit_failed(str(error))
            raise
        self._tip = Link(offset, digest_record(outputs.progress))

    def _checkpoint_due(self) -> bool:
        free = not self._open.reports and not self._writer.busy
        return free and self._schedule.due(self._engine.step_number, self._now_s())

    def _snapshot(self) -> None:
        """Hand an immutable state to the writer. The loop stands still for the copy of what is not shared only."""
        began_s = self._now_s()
        state = self._engine.state()
        self._snapshot_s = self._now_s() - began_s
        provenance = Provenance(
            lineage=self._lineage,
            incarnation=self._incarnation,
            positions=self._positions,
            topic_ids=self._topic_ids,
            progress=self._tip,
            settings=self._terms.settings,
            fingerprint=self._terms.fingerprint,
            created_ms=int(self._world.wall_s() * 1000),
            revision=self._revision,
            excluded=self._excluded,
            leader_epochs=self._source.leader_epochs(),
        )
        self._schedule.tried(self._now_s())
        self._writer.submit(state, provenance)

    def _heed_checkpoint(self, outcome: Outcome | None) -> None:
        """
        Say what became of a checkpoint.

        One that failed is no loss: the log has every step, the older ones are intact, and the loop goes on; the next
        attempt begins from nothing when it is due. It ends (74) when the disk did not merely refuse but failed, for
        its word is worth nothing then, and when a restart would have to replay too much.
        """
        if isinstance(outcome, Kept):
            self._keep(outcome)
        elif outcome is not None:
            self._fail(outcome)

    def _keep(self, outcome: Kept) -> None:
        generation = outcome.written.generation
        self._schedule.kept(generation.step)
        self._observer.observe_checkpoint(
            Checkpointed(
                outcome="written",
                step=generation.step,
                bytes=generation.bytes,
                snapshot_s=self._snapshot_s,
                write_s=outcome.written.write_s,
                fsync_s=outcome.written.fsync_s,
                at_s=self._world.wall_s(),
                positions=generation.provenance.positions,
            )
        )
        self._log.info("checkpoint", step=generation.step, series=generation.series, bytes=generation.bytes)
        if outcome.leftover:
            self._log.warning("old checkpoints stay", error=outcome.leftover)
        if self._trims and outcome.oldest is not None:
            try:
                self._world.progress.trim(outcome.oldest.offset)
            except StreamlstmError as error:
                self._log.warning("the progress log was not trimmed", error=str(error))

    def _fail(self, outcome: Failed) -> None:
        self._observer.observe_checkpoint(
            Checkpointed(
                outcome="failed",
                step=outcome.step,
                bytes=0,
                snapshot_s=self._snapshot_s,
                write_s=0.0,
                fsync_s=0.0,
                at_s=self._world.wall_s(),
                positions=self._positions,
                error=str(outcome.error),
            )
        )
        self._log.error("checkpoint failed", step=outcome.step, error=str(outcome.error))
        if not outcome.may_pass:
            raise outcome.error
        if self._schedule.too_far():
            raise CheckpointNotWritten(
                f"{self._schedule.since_durable} records were consumed since the last checkpoint, too many to replay; "
                f"{outcome.error}; {_MEND}"
            ) from outcome.error

    def _finish(self) -> None:
        """Commit what is open, then leave a checkpoint if there is time; without it the next start replays more."""
        if self._open.reports:
            self._commit()
        self._heed_checkpoint(self._writer.poll(self._left_s()))
        if self._engine.step_number > self._schedule.durable_step and not self._writer.busy:
            self._snapshot()
            outcome = self._writer.poll(self._left_s())
            self._heed_checkpoint(outcome)
            if isinstance(outcome, Failed):
                raise CheckpointNotWritten(f"{outcome.error}; {_MEND}") from outcome.error
        behind = self._engine.step_number - self._schedule.durable_step
        if behind:
            self._log.warning("stopped without a last checkpoint", steps_to_replay=behind)
        else:
            self._log.info("stopped", step=self._engine.step_number)

    def _left_s(self) -> float:
        """For the disk, with something over for closing; the watchdog ends the process at the deadline."""
        return max(0.1, 0.8 * self._stop.left_s(self._pace.shutdown_timeout_s))

    def _tell_lag(self) -> None:
        now_s = self._now_s()
        if now_s - self._lag_told_s >= _LAG_EVERY_S:
            self._lag_told_s = now_s
            self._observer.observe_lag(self._source.lag())


class StoppedEarly(Exception):
    """Asked to stop before start-up was over. Nothing had been begun that must be finished."""


class Startup:
    """What start-up finds, told to the log and the observer as it is found."""

    def __init__(
        self, observer: Observer, log: Log, stop: Stop, monotonic_s: Callable[[], float], fingerprint: Fingerprint
    ) -> None:
        self._observer, self._log, self._stop, self._monotonic_s = observer, log, stop, monotonic_s
        self._fingerprint = fingerprint
        observer.observe_phase("starting")
        self._told_s = float("-inf")

    def found_bad(self, refused: Refused, moved_to: str) -> None:
        """See :class:`~streamlstm.recovery.resume.Witness`."""
        self._log.error(
            "a checkpoint is bad and was put aside; an older one is used",
            step=refused.step,
            reason=refused.reason,
            moved_to=moved_to,
        )

    def left_behind(self, refused: Refused, moved_to: str) -> None:
        """See :class:`~streamlstm.recovery.resume.Witness`."""
        self._log.info("a checkpoint that the chain went back from was put aside", step=refused.step, moved_to=moved_to)

    def goes_back(self, last_step: int, step: int, revision: int) -> None:
        """See :class:`~streamlstm.recovery.resume.Witness`."""
        self._log.error(
            "the progress log has lost its end; what was published after this checkpoint is published again under the "
            "next revision",
            last_step=last_step,
            step=step,
            revision=revision,
        )

    def begins_anew(self, why: str, revision: int, moved_to: Sequence[str]) -> None:
        """See :class:`~streamlstm.recovery.resume.Witness`."""
        self._log.warning(
            "begins anew; the old checkpoints were put aside", why=why, revision=revision, moved_to=moved_to
        )

    def rebuilds(self, why: str, steps: int) -> None:
        """See :class:`~streamlstm.recovery.resume.Witness`."""
        self._log.warning("everything is computed again from the log", why=why, steps=steps)

    def passes_over(self, ranges: Sequence[Range]) -> None:
        """See :class:`~streamlstm.recovery.resume.Witness`."""
        tell_gap(self._log, self._observer, ranges)

    def rebases(self, differences: Sequence[str], steps: int) -> None:
        """See :class:`~streamlstm.recovery.resume.Witness`."""
        self._log.warning(
            "another machine or other libraries: the steps since the checkpoint are replayed with other bits",
            differences=list(differences),
            steps=steps,
        )

    def replayed(self, step: int, last: int) -> None:
        """See :class:`~streamlstm.recovery.resume.Witness`. Raises :class:`StoppedEarly` when asked to stop."""
        if self._stop.requested:
            raise StoppedEarly
        now_s = self._monotonic_s()
        self._observer.observe_turn(now_s)
        if now_s - self._told_s >= _LAG_EVERY_S or step == last:
            self._told_s = now_s
            self._observer.observe_phase("replaying")
            self._log.info("replaying", step=step, last=last)

    def repeated(self, repeated: Repeated) -> None:
        """See :class:`~streamlstm.recovery.resume.Witness`."""
        self._log.info("published again; readers may have seen some of it before", **repeated._asdict())

    def ready(self, ready: Ready) -> None:
        """Start-up is over."""
        self._observer.observe_resume(
            Resumed(
                source=ready.source,
                step=ready.engine.step_number,
                replayed_steps=ready.replayed_steps,
                rebased=ready.rebased,
                reproducible=ROWS not in self._fingerprint,
                quarantined=len(ready.refused),
                phases_s=ready.phases_s,
                checkpoint_step=ready.generation.step,
                checkpoint_at_s=ready.generation.provenance.created_ms / 1000,
                positions=ready.positions,
                checkpoint_positions=ready.generation.provenance.positions,
                census=ready.engine.census(),
            )
        )
        self._log.info(
            "ready",
            source=ready.source,
            step=ready.engine.step_number,
            checkpoint=ready.generation.step,
            replayed_steps=ready.replayed_steps,
            rebased=ready.rebased,
            bits="; ".join(ready.differences) or "can be expected to match",
            incarnation=ready.incarnation,
        )


def tell_gap(log: Log, observer: Observer, ranges: Sequence[Range]) -> None:
    """Loudly: nobody will ever learn from these records."""
    observer.observe_gap(ranges)
    for r in ranges:
        log.error(
            "retention deleted offsets that are needed; they are passed over",
            topic=r.topic,
            partition=r.partition,
            start=r.start,
            end=r.end,
        )


def _bytes_by_topic(messages: Messages) -> dict[str, int]:
    total = {r.topic: 0 for r in messages.cut}
    pairs = zip(messages.range_index.tolist(), messages.value, strict=True)
    for index, group in groupby(pairs, key=lambda pair: pair[0]):
        total[messages.cut[index].topic] += sum(len(value or b"") for _, value in group)
    return total
