"""
The store of durable generations: what is written, which of them is used, and which of them stay.

There is no pointer: the newest generation that is whole wins. A bad one is put aside as ``<step>.bad-<n>`` once an
older one was found good; when none is, nothing is touched and the start is refused. What a generation is:
:mod:`streamlstm.recovery.generations`; where they live, and how one comes to be there at one instant:
:mod:`streamlstm.recovery.directory`, :mod:`streamlstm.recovery.objects`.
"""

import errno
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from streamlstm.config.urls import mask_credentials, split_object_url
from streamlstm.engine.state import EngineState, Stored
from streamlstm.errors import CheckpointError, CheckpointNotWritten, ConfigError, StreamlstmError, Temporary
from streamlstm.recovery.directory import Directory
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.encoding import Encoder
from streamlstm.recovery.generations import (
    Files,
    Header,
    Loaded,
    copy_file,
    files_of,
    load_generation,
    read_header,
    verify_generation,
)
from streamlstm.recovery.leavers import Base, LeaversPlan
from streamlstm.recovery.manifest import LAYOUT, Layout, Listed, NewerSchema, digest_manifest, reseal, seal
from streamlstm.recovery.objects import ObjectPrefix, connect
from streamlstm.recovery.place import CHECKPOINT_URL, Attempt, Draft, Place, name_of, step_of_bad
from streamlstm.recovery.progress import Link
from streamlstm.recovery.provenance import Generation, Provenance
from streamlstm.recovery.scratch import Scratch, ScratchView
from streamlstm.transport.interfaces import Frozen

_DAY_MS = 86_400_000

# What an operator has to mend before a start, as against a disk that is full or broken.
_SETUP = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST}


@dataclass(frozen=True, slots=True)
class Written:
    """A generation made durable, and how long that took."""

    generation: Generation
    write_s: float
    fsync_s: float


class Refused(NamedTuple):
    """A generation that cannot be used, and why. ``left``: it is not bad, the chain went back from it."""

    step: int
    reason: str
    left: bool = False


class Keep(NamedTuple):
    """The newest ``last`` generations stay, and the newest of each of the last ``daily`` UTC days that have one."""

    last: int
    daily: int = 0


def open_store(url: str | Path, disk: Disk | None = None, setting: str = CHECKPOINT_URL) -> "CheckpointStore":
    """
    The store that ``setting`` names: a directory, or a prefix in an object store. Nothing is touched yet.

    Raises ``ValueError`` for a URL that is neither.
    """
    remote = split_object_url(url) if isinstance(url, str) else None
    if remote is None:
        return CheckpointStore(Directory(Path(url), disk, setting))
    root = f"{remote.bucket}/{remote.prefix}".rstrip("/")
    return CheckpointStore(ObjectPrefix(mask_credentials(str(url)), root, lambda: connect(remote)))


class CheckpointStore:
    """
    The generations in one place, owned by one process.

    :meth:`open` must come first; only what reads does without it.
    """

    def __init__(self, place: Place, layout: Layout = LAYOUT) -> None:
        self._place, self._layout = place, layout
        # What this process has written or read whole, and what else it has read of: none of it changes under its name.
        self._whole: set[int] = set()
        self._told: dict[int, Provenance] = {}
        self._last: tuple[weakref.ref[Scratch], int, str] | None = None

    @property
    def name(self) -> str:
        """The place, as an operator knows it."""
        return self._place.name

    @property
    def setting(self) -> str:
        """The key or the option by which the operator named the place."""
        return self._place.setting

    @property
    def directory(self) -> Path | None:
        """The place, where it is a directory of this machine."""
        return self._place.directory

    def open(self) -> Self:
        """
        Take the place, making it if it is missing, and sweep up what a killed process left. Nothing when it is open.

        Another process in it is :class:`~streamlstm.errors.Temporary` (75), as far as the place can tell. A place that
        cannot be used is :class:`~streamlstm.errors.ConfigError` (78), one that is full or fails
        :class:`~streamlstm.errors.CheckpointNotWritten` (74).
        """
        try:
            self._place.open()
        except OSError as error:
            if error.errno in _SETUP:
                raise self._unfit(error) from error
            raise CheckpointNotWritten(f"{self._where()}: {error.strerror or error}") from error
        return self

    def _unfit(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self._where()}: {error.strerror or error}; it must be {self._place.needs}")

    def _where(self) -> str:
        return f"{self.setting}: {self.name}"

    def close(self) -> None:
        """Let go of the place."""
        self._place.close()

    def leave(self) -> None:
        """Let go of the place; where :meth:`open` made it and nothing was written, it is as if it had never been."""
        self._place.leave()

    def steps(self) -> list[int]:
        """
        The generations that are there, whole or not, oldest first.

        A place that is no place for them is :class:`~streamlstm.errors.ConfigError` (78), as in :meth:`open`.
        """
        try:
            return self._place.steps()
        except (NotADirectoryError, PermissionError) as error:
            raise self._unfit(error) from error

    def bad(self) -> list[str]:
        """The names of bad generations that were put aside, by this process or an earlier one; oldest first."""
        try:
            return self._place.bad()
        except (NotADirectoryError, PermissionError) as error:
            raise self._unfit(error) from error

    def verify(self, step: int) -> Generation:
        """
        Check every byte of a generation against its manifest. Parses nothing but the two JSON files.

        Raises :class:`~streamlstm.errors.CheckpointError` with the file at fault.
        """
        generation = verify_generation(self._place.files(step), step, self._layout)
        self._seen_whole(generation)
        return generation

    def files(self, step: int) -> Files:
        """The files of a generation, as they are."""
        return self._place.files(step)

    def header(self, step: int) -> Header:
        """What a generation says of itself, by its two JSON files alone. Raises like :meth:`verify`."""
        return read_header(self._place.files(step), step, self._layout)

    def verify_bad(self, name: str) -> Generation:
        """Check every byte of one that was put aside under this name: it may be whole. Raises like :meth:`verify`."""
        return verify_generation(self._place.files_of_bad(name), step_of_bad(name), self._layout)

    def load(self, step: int) -> Loaded:
        """Check a generation and read it. Raises :class:`~streamlstm.errors.CheckpointError`."""
        loaded = load_generation(self._place.files(step), step, self._layout)
        self._seen_whole(loaded.generation)
        return loaded

    def newest(
        self, beyond: Mapping[int, Refused] | None = None, among: Sequence[int] | None = None
    ) -> tuple[Loaded | None, list[Refused]]:
        """
        The newest generation that is whole, and the newer ones that are not, which are to be put aside.

        ``beyond`` holds generations that the progress chain does not know; ``among`` are the :meth:`steps` to look
        at, all by default. ``None`` is returned when there is none at all. Raises
        :class:`~streamlstm.errors.CheckpointError`, naming each reason, when there are some and none is good.
        """
        refused: list[Refused] = []
        for step in reversed(self.steps() if among is None else among):
            if beyond and step in beyond:
                refused.append(beyond[step])
                continue
            try:
                return self.load(step), refused
            except NewerSchema as error:
                raise CheckpointError(f"{self.name}, step {step}: {error}") from error
            except (CheckpointError, OSError) as error:
                refused.append(Refused(step, str(error)))
        if refused:
            reasons = "; ".join(f"{r.step}: {r.reason}" for r in refused)
            raise CheckpointError(f"no checkpoint in {self.name} can be used: {reasons}")
        return None, []

    def put_aside(self, step: int) -> str:
        """
        Take a bad generation out of the way, so that it is neither used nor counted again; its new name.

        Only once an older one was found good: a start that is refused touches nothing. Raises
        :class:`~streamlstm.errors.Temporary` where another process has removed it or made another of its step.
        """
        self._forget(step)
        try:
            return self._place.put_aside(step)
        except FileNotFoundError as error:
            raise Temporary(
                f"the checkpoint of step {step} in {self.name} was to be put aside, but another process has removed or "
                "replaced it meanwhile"
            ) from error
        except OSError as error:
            raise CheckpointNotWritten(
                f"the checkpoint of step {step} in {self.name} cannot be put aside: {error}"
            ) from error

    def bring_back(self, name: str) -> Generation:
        """
        Give one that was put aside its place again, once every byte of it was checked. The place must be free.

        Raises :class:`~streamlstm.errors.CheckpointError` when it is bad.
        """
        generation = self.verify_bad(name)
        try:
            self._place.bring_back(name)
        except OSError as error:
            raise CheckpointNotWritten(f"{name} in {self.name} cannot be brought back: {error}") from error
        return generation

    def take_in(self, files: Files, step: int) -> Generation:
        """
        Make a generation that was made elsewhere durable here, in place of one of the same step.

        Every byte is checked before it counts. Raises :class:`~streamlstm.errors.CheckpointError` when one is not as
        the manifest says, else like :meth:`write`; neither leaves anything behind.
        """
        header = read_header(files, step, self._layout)
        self._forget(step)
        attempt = self._place.begin(step)
        try:
            for name, expected in sorted(header.manifest.files.items()):
                with files.open(header.manifest.attempt, name) as file, attempt.create(name) as draft:
                    copy_file(name, file, expected, draft.write)
                    draft.sync()
            attempt.commit(reseal(header.sealed, attempt.ident))
        except CheckpointError:
            attempt.discard()
            raise
        except OSError as error:
            attempt.discard()
            raise CheckpointNotWritten(
                f"the checkpoint of step {step} could not be written to {self.name}: {error.strerror or error}"
            ) from error
        return header.generation

    def write(
        self, state: EngineState, provenance: Provenance, beside: Frozen | None = None, *, last: bool = False
    ) -> Written:
        """
        Make a state durable, and what goes beside it: every file, then the manifest, and only then is it announced.

        ``last``: the state is not read again, so that it may be let go of piece by piece, whatever comes of this.

        Raises :class:`~streamlstm.errors.CheckpointNotWritten`, whose cause is the ``OSError``; older generations are
        then as they were, and the attempt's files are gone if the place lets them be removed.
        """
        attempt = self._place.begin(state.step)
        self._forget(state.step)
        try:
            written = self._write(state, provenance, beside, attempt, last=last)
        except OSError as error:
            attempt.discard()
            raise CheckpointNotWritten(
                f"the checkpoint of step {state.step} could not be written to {self.name}: {error.strerror or error}"
            ) from error
        self._seen_whole(written.generation)
        return written

    def surplus(self, keep: Keep) -> list[str]:
        """
        What :meth:`prune` would remove: generations, oldest first, and all but ``keep.last`` of those put aside.

        Never the newest that is whole, whatever stands before it. Days are those of the generations' own stamps, so no
        clock is asked; each stamp is read once in a process's life.
        """
        steps = self.steps()
        for gone in self._told.keys() - set(steps):
            self._forget(gone)
        kept = set(steps[-keep.last :])
        days: set[int] = set()
        for step in reversed(steps) if keep.daily else ():
            made = self._provenance(step)
            if made is not None and len(days) < keep.daily and (day := made.created_ms // _DAY_MS) not in days:
                days.add(day)
                kept.add(step)
        newest = next((step for step in reversed(steps) if self._is_whole(step)), None)
        going = [name_of(step) for step in steps if step not in kept and step != newest]
        return going + self.bad()[: -keep.last]

    def prune(self, keep: Keep) -> str:
        """
        Remove :meth:`surplus`. Returns why something could not be removed, or nothing.

        A checkpoint is no less durable because an older one is still there.
        """
        try:
            for name in self.surplus(keep):
                self._place.remove(name)
        except (OSError, StreamlstmError) as error:
            return f"an old checkpoint could not be removed: {error}"
        return ""

    def oldest_link(self) -> Link | None:
        """
        The progress record that the oldest generation stands on: the chain is needed from there.

        ``None`` when it precedes the chain, or cannot be read: then all of the chain is to be kept.
        """
        try:
            steps = self.steps()
            return self.header(steps[0]).generation.provenance.progress if steps else None
        except (StreamlstmError, OSError):
            return None

    def _provenance(self, step: int) -> Provenance | None:
        """As the generation tells it, ``None`` when it is bad. A place that does not answer raises."""
        if step not in self._told:
            try:
                self._told[step] = self.header(step).generation.provenance
            except (CheckpointError, OSError):
                return None
        return self._told[step]

    def _is_whole(self, step: int) -> bool:
        if step not in self._whole:
            try:
                self.verify(step)
            except (CheckpointError, OSError):
                return False
        return True

    def _seen_whole(self, generation: Generation) -> None:
        self._whole.add(generation.step)
        self._told[generation.step] = generation.provenance

    def _forget(self, step: int) -> None:
        self._whole.discard(step)
        self._told.pop(step, None)

    def _write(
        self, state: EngineState, provenance: Provenance, beside: Frozen | None, attempt: Attempt, *, last: bool
    ) -> Written:
        began = time.perf_counter()
        fsync_s = 0.0
        listed: dict[str, Listed] = {}
        base = self._base(state.stored)
        leavers = LeaversPlan(state, Base(base.meta.step, base.manifest.attempt, base.files_left) if base else None)
        files = files_of(state, provenance, beside, leavers, last=last)
        # Each is synced when the next one is written: the disk is at work meanwhile, and nobody waits for it.
        unsynced: list[Draft] = []
        with Encoder(files.values()) as made, ExitStack() as drafts:
            for name in files:
                unsynced.append(drafts.enter_context(attempt.create(name)))
                listed[name] = made.copy_next(unsynced[-1].write)
                if len(unsynced) > 1:
                    fsync_s += _sync(unsynced.pop(0))
            fsync_s += sum(map(_sync, unsynced))
        for file in leavers.linked:
            assert base is not None
            attempt.link(base.meta.step, base.manifest.attempt, file.name)
            listed[file.name] = base.manifest.files[file.name]
        manifest = seal(
            state.step, provenance.settings.hash, provenance.fingerprint, listed, attempt.ident, self._layout
        )
        committing = time.perf_counter()
        attempt.commit(manifest)
        done = time.perf_counter()
        fsync_s += done - committing
        size = len(manifest) + sum(entry.bytes for entry in listed.values())
        left = leavers.told()
        stored = left.series if left else 0
        generation = Generation(state.step, digest_manifest(manifest), size, len(state.series), stored, provenance)
        if isinstance(state.stored, ScratchView):
            self._last = weakref.ref(state.stored.scratch), generation.step, generation.digest
        return Written(generation, write_s=done - began - fsync_s, fsync_s=fsync_s)

    def _base(self, stored: Stored | None) -> Header | None:
        """The generation that holds who had left by its step, for those who ``stored`` are: the last of their own."""
        if not isinstance(stored, ScratchView):
            return None
        last = self._last
        if last and last[0]() is stored.scratch:
            steps, digest = [last[1]], last[2]
        elif stored.origin:
            try:
                steps, digest = list(reversed(self.steps())), stored.origin
            except (StreamlstmError, OSError):
                return None
        else:
            return None
        for step in steps:
            try:
                header = self.header(step)
            except (StreamlstmError, OSError):
                continue
            if header.generation.digest == digest:
                return header
        return None


def _sync(draft: Draft) -> float:
    """Seconds spent."""
    began = time.perf_counter()
    draft.sync()
    return time.perf_counter() - began
