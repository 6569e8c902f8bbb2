"""The journal: what was acknowledged is there, whatever failed, was killed or lost its power."""

import contextlib
import errno
import itertools
import logging
import os
import random
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import BinaryIO

import pytest
from adversary import Adversary, PowerCut, leave, model
from fakes import Crash, Fate, FatedDisk

from streamlstm.errors import CheckpointNotWritten, ProgressError
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.journal import Journal

STATES = 300
SMALL = 1000
"""Bytes of a file: about three records of :func:`value`."""


def value(number: int) -> bytes:
    return b'{"step":%d,"of":"%b"}' % (number, b"abcdefghij" * (20 + number % 30))


def unsynced() -> Disk:
    """For what no power cut follows: faster."""
    return FatedDisk(Fate())


LEFT_OPEN: list[Journal] = []


@pytest.fixture(autouse=True)
def _closed():
    yield
    for journal in LEFT_OPEN:
        journal.close()
    LEFT_OPEN.clear()


def opened(directory: Path, disk: Disk | None = None) -> Journal:
    journal = Journal(directory, disk or unsynced(), SMALL)
    LEFT_OPEN.append(journal)
    journal.open()
    return journal


def filled(directory: Path, records: int) -> Journal:
    journal = opened(directory)
    for number in range(records):
        assert journal.append(value(number)) == number
    return journal


def held(directory: Path) -> list[bytes]:
    """What the next start finds, which must be numbered without a gap."""
    journal = opened(directory)
    entries = journal.read()
    journal.close()
    assert [e.offset for e in entries] == list(range(entries[0].offset, entries[-1].offset + 1)) if entries else True
    return [e.value for e in entries]


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def test_records_are_numbered_and_read_back_by_this_process_and_the_next(tmp_path):
    journal = filled(tmp_path / "journal", 10)
    assert [(e.offset, e.value) for e in journal.read(7)] == [(n, value(n)) for n in (7, 8, 9)]
    journal.close()

    again = opened(tmp_path / "journal")
    assert again.append(value(10)) == 10
    assert [e.value for e in again.read()] == [value(n) for n in range(11)]


def test_a_journal_that_was_never_opened_is_empty_and_makes_nothing(tmp_path):
    assert Journal(tmp_path / "journal").read() == []
    assert not (tmp_path / "journal").exists()


def test_a_journal_that_was_never_appended_to_makes_nothing(tmp_path):
    journal = opened(tmp_path / "journal")
    assert journal.read() == []
    journal.trim(1)
    journal.close()
    assert not (tmp_path / "journal").exists()


def test_files_are_bounded_and_private(tmp_path):
    filled(tmp_path / "journal", 50)

    assert len(files(tmp_path / "journal")) > 10
    assert all(path.stat().st_size <= SMALL for path in files(tmp_path / "journal"))
    assert {path.stat().st_mode & 0o777 for path in files(tmp_path / "journal")} == {0o600}


def test_a_record_longer_than_a_file_has_one_for_itself(tmp_path):
    journal = filled(tmp_path / "journal", 2)
    journal.append(b"x" * 5 * SMALL)
    journal.append(b"y")

    assert held(tmp_path / "journal")[2:] == [b"x" * 5 * SMALL, b"y"]
    assert len(files(tmp_path / "journal")) == 3


def test_trimming_removes_whole_files_and_nothing_that_is_needed(tmp_path):
    journal = filled(tmp_path / "journal", 30)
    journal.trim(17)
    entries = journal.read()
    assert 0 < entries[0].offset <= 17
    assert entries[0].offset > 17 - 5
    assert entries[-1].offset == 29
    assert journal.read(20)[0].offset == 20
    journal.trim(1000)
    assert len(files(tmp_path / "journal")) == 1
    assert journal.append(value(30)) == 30
    journal.close()
    assert held(tmp_path / "journal")[-1] == value(30)


def test_a_write_that_was_cut_off_anywhere_is_dropped_and_said(tmp_path, caplog):
    filled(tmp_path / "journal", 2).close()
    (path,) = files(tmp_path / "journal")
    whole = path.read_bytes()
    first = len(whole) - len(value(1)) - 32
    for size in range(first + 1, len(whole), 3):
        path.write_bytes(whole[:size])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            journal = opened(tmp_path / "journal")
        assert "record 1 was cut off while it was written, and is dropped" in caplog.text
        assert journal.append(value(5)) == 1
        journal.close()
        assert held(tmp_path / "journal") == [value(0), value(5)], size


def test_a_write_whose_sectors_never_reached_the_disk_is_dropped(tmp_path):
    filled(tmp_path / "journal", 3).close()
    (path,) = files(tmp_path / "journal")
    whole = path.read_bytes()
    last = len(whole) - len(value(2)) - 32
    assert last < 512 < len(whole)
    for lost in (range(last, 512), range(512, len(whole)), range(last, len(whole))):
        path.write_bytes(bytes(0 if at in lost else byte for at, byte in enumerate(whole)))
        assert held(tmp_path / "journal") == [value(0), value(1)]


def test_whoever_only_reads_does_not_mind_a_write_that_is_not_done_and_changes_nothing(tmp_path):
    filled(tmp_path / "journal", 2).close()
    (path,) = files(tmp_path / "journal")
    path.write_bytes(path.read_bytes()[:-5])

    assert [e.value for e in Journal(tmp_path / "journal").read()] == [value(0)]
    assert len(path.read_bytes()) > 32 + len(value(0))


def test_no_flipped_bit_goes_unnoticed_wherever_it_is(tmp_path):
    filled(tmp_path / "journal", 5).close()
    seen = 0
    for path in files(tmp_path / "journal"):
        whole = path.read_bytes()
        for at in range(0, len(whole), 3):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            with pytest.raises(ProgressError, match=rf"{path.name}: record \d, at byte \d+, is damaged") as caught:
                held(tmp_path / "journal")
            assert caught.value.exit_code == 65
            seen += 1
        path.write_bytes(whole)
    assert len(files(tmp_path / "journal")) == 2
    assert seen > 400


def test_a_file_that_is_missing_or_cut_in_the_middle_is_refused(tmp_path):
    filled(tmp_path / "journal", 12).close()
    first, second, *_ = files(tmp_path / "journal")
    whole = second.read_bytes()
    second.write_bytes(whole[:-1])
    with pytest.raises(ProgressError, match=f"{second.name}: record 5, at byte"):
        held(tmp_path / "journal")
    second.unlink()
    with pytest.raises(ProgressError, match="begins with record 6, and records from 3 on are missing"):
        held(tmp_path / "journal")
    first.unlink()  # as trimming would
    assert len(held(tmp_path / "journal")) == 6


class Failing(Disk):
    """The so-many-th operation fails; ``failed`` says that it came to that."""

    def __init__(self, at: int, number: int) -> None:
        self.left, self.number, self.failed = at, number, False

    def _point(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.failed = True
            raise OSError(self.number, os.strerror(self.number))

    def make_directory(self, path: Path) -> None:
        self._point()
        super().make_directory(path)

    def create(self, path: Path) -> BinaryIO:
        self._point()
        return super().create(path)

    def reopen(self, path: Path) -> BinaryIO:
        self._point()
        return super().reopen(path)

    def truncate(self, file: BinaryIO, size: int) -> None:
        self._point()
        super().truncate(file, size)

    def write(self, file: BinaryIO, data: bytes | memoryview) -> None:
        super().write(file, data[: len(data) // 2])
        self._point()
        super().write(file, data[len(data) // 2 :])

    def sync(self, file: BinaryIO) -> None:
        self._point()

    def sync_data(self, file: BinaryIO) -> None:
        self._point()

    def sync_directory(self, path: Path) -> None:
        self._point()

    def remove_tree(self, path: Path) -> None:
        self._point()
        super().remove_tree(path)


def life(directory: Path, disk: Disk, acknowledged: list[bytes], records: int = 8) -> None:
    """One process: opens, appends, trims a little. What it built upon is kept for the test."""
    journal = opened(directory, disk)
    try:
        acknowledged += [e.value for e in journal.read()[-1:] if e.value not in acknowledged]
        first = len(acknowledged)
        for number in range(first, first + records):
            journal.append(value(number))
            acknowledged.append(value(number))
        journal.trim(first)
    finally:
        journal.close()


def check_nothing_lost(directory: Path, acknowledged: list[bytes]) -> list[bytes]:
    """What is there ends with all that was acknowledged, and at most one record more, which nobody heard of."""
    found = held(directory)
    extra = found[-1:] if found and found[-1] not in acknowledged else []
    assert found[: len(found) - len(extra)] == acknowledged[len(acknowledged) + len(extra) - len(found) :]
    assert len(found) >= min(len(acknowledged), 8)
    return [*acknowledged, *extra]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_any_operation_that_fails_ends_it_and_loses_nothing(tmp_path, number):
    directory = tmp_path / "journal"
    for at in itertools.count():
        acknowledged: list[bytes] = []
        life(directory, unsynced(), acknowledged)
        (newest := files(directory)[-1]).write_bytes(newest.read_bytes() + b"torn")
        disk, raised = Failing(at, number), None
        try:
            life(directory, disk, acknowledged)
        except CheckpointNotWritten as error:
            raised = error
        assert disk.failed == (raised is not None and os.strerror(number) in str(raised))
        acknowledged = check_nothing_lost(directory, acknowledged)
        life(directory, unsynced(), acknowledged, records=3)
        assert held(directory)[-3:] == acknowledged[-3:]
        shutil.rmtree(directory)
        if not disk.failed:
            break
    assert at > 25


def test_after_a_failure_it_refuses_although_the_disk_would_work_again(tmp_path):
    journal = Journal(tmp_path / "journal", Failing(4, errno.EIO), SMALL)
    journal.open()
    with pytest.raises(CheckpointNotWritten, match="Input/output error") as caught:
        journal.append(value(0))
    assert caught.value.exit_code == 74
    for _ in range(2):
        with pytest.raises(CheckpointNotWritten, match="has failed: start again"):
            journal.append(value(0))


def test_a_kill_at_any_operation_loses_nothing_also_when_the_next_start_is_killed_too(tmp_path):
    directory = tmp_path / "journal"
    for at in itertools.count():
        finished = True
        acknowledged: list[bytes] = []
        for fate in (Fate(at), Fate(at % 5), Fate(at % 7)):
            try:
                life(directory, FatedDisk(fate), acknowledged)
            except Crash:
                finished = False
            if directory.exists():
                acknowledged = check_nothing_lost(directory, acknowledged)
        life(directory, unsynced(), acknowledged)
        shutil.rmtree(directory)
        if finished or at > 80:
            break
    assert at > 40


def explore(tmp_path: Path, forget: str, states: int, *, failing: bool = False) -> tuple[int, int]:
    """
    Crash states tried, and those where something acknowledged was lost or what is there cannot be read.

    Lives follow each other on the same disk, each ended by a power cut, and with ``failing`` by a failed sync before.
    """
    rng = random.Random(17)
    lost = seen = 0
    while seen < states:
        acknowledged: list[bytes] = []
        root = tmp_path / "0"
        root.mkdir()
        for turn in range(3):
            one_life(root, rng, acknowledged, forget, failing=failing)
            seen += 1
            try:
                acknowledged = check_nothing_lost(root / "journal", acknowledged)
            except (ProgressError, AssertionError, IndexError):
                lost += 1
                break
            finally:
                root = root.rename(tmp_path / str(turn + 1))
        shutil.rmtree(root)
    return seen, lost


def one_life(root: Path, rng: random.Random, acknowledged: list[bytes], forget: str, *, failing: bool) -> None:
    disk = Adversary(root, model(root), rng.randrange(1, 40), forget, rng.randrange(1, 10) if failing else 0)
    try:
        for _ in range(2):
            # After a failed sync the next process on the same machine reads what the cache still holds.
            with contextlib.suppress(CheckpointNotWritten):
                life(root / "journal", disk, acknowledged)
    except PowerCut:
        pass
    after = root.with_name("after")
    leave(disk.inode, after, rng)
    shutil.rmtree(root)
    after.rename(root)


def test_no_power_cut_loses_what_was_acknowledged(tmp_path):
    assert explore(tmp_path, "", STATES) == (STATES, 0)


def test_no_power_cut_after_a_failed_sync_loses_what_was_built_upon(tmp_path):
    assert explore(tmp_path, "", STATES, failing=True) == (STATES, 0)


@pytest.mark.parametrize("forget", ["sync_data", "sync_directory", "sync_parent"])
def test_none_of_the_syncs_could_be_left_out(tmp_path, forget):
    assert explore(tmp_path, forget, STATES // 2)[1] > 0


class Watched(PosixPath):
    """
    A path under which anything may happen between the steps of reading it.

    As the kernel does it: names come a few at a time, in an order of their own, each few as they are at that instant;
    bytes come from the file that was opened, whatever is called so by now.
    """

    meanwhile: Callable[[], None]
    few: int

    def iterdir(self) -> Iterator["Watched"]:
        type(self).meanwhile()
        seen: list[str] = []
        while True:
            left = sorted((scattered(name), name) for name in (path.name for path in Path(self).iterdir()))
            taken = [name for _, name in left if not seen or scattered(name) > scattered(seen[-1])][: self.few]
            if not taken:
                return iter([self / name for name in seen])
            seen += taken
            type(self).meanwhile()

    def read_bytes(self) -> bytes:
        type(self).meanwhile()
        with self.open("rb", buffering=0) as file:
            parts = [file.read(self.few * 150)]
            while parts[-1]:
                type(self).meanwhile()
                parts.append(file.read(self.few * 150))
        return b"".join(parts)


def scattered(name: str) -> int:
    return zlib.crc32(name.encode())


def reader_of(directory: Path, meanwhile: Callable[[], None], few: int = 1000) -> Journal:
    """Whoever reads, with its steps apart."""
    watched = type("WatchedOnce", (Watched,), {"meanwhile": staticmethod(meanwhile), "few": few})
    return Journal(watched(directory))


class Owner:
    """Appends, trims, is killed before or in the middle of a write, starts again: by dice, a little at a time."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.directory, self.rng = directory, rng
        self.journal = filled(directory, rng.randrange(1, 25))
        self.held = {e.offset: e.value for e in self.journal.read()}
        self.ever = dict(self.held)
        self.killed = False

    def live(self, moves: int) -> None:
        for _ in range(moves):
            if self.killed:
                self.journal.open()
                self.killed = False
            elif (die := self.rng.random()) < 0.1:
                self.be_killed()
            elif die < 0.7:
                number = max(self.held) + 1
                self.held[number] = self.ever[number] = value(number) + b" " * self.rng.randrange(300)
                assert self.journal.append(self.held[number]) == number
            else:
                self.trim()

    def trim(self) -> None:
        if len(names := files(self.directory)) > 2:
            first = int(self.rng.choice(names[max(-5, -len(names)) : -1]).stem)
            self.journal.trim(first)
            self.held = {number: kept for number, kept in self.held.items() if number >= first}

    def be_killed(self) -> None:
        """Nothing of the record was published, so the next one of this number may be another."""
        self.journal.close()
        newest = files(self.directory)[-1]
        if self.rng.random() < 0.3:
            newest = newest.with_name(f"{max(self.held) + 1:020d}.records")
            newest.touch()
        whole = newest.stat().st_size
        other = Journal(self.directory.with_name("other"), unsynced())
        other.directory.mkdir()
        shutil.copy(newest, other.directory)
        other.open()
        other.append(value(max(self.held) + 1) + b"-" * self.rng.randrange(300))
        other.close()
        written = (other.directory / newest.name).read_bytes()
        shutil.rmtree(other.directory)
        newest.write_bytes(written[: self.rng.randrange(whole, len(written))])
        self.killed = True


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_owner_does_between_the_steps_of_a_reader_it_sees_a_chain_without_a_gap(tmp_path, seed):
    rng = random.Random(seed)
    for turn in range(8):
        (root := tmp_path / str(turn)).mkdir()
        owner = Owner(root / "journal", rng)
        busy = rng.choice([1, 3, 10])
        reader = reader_of(owner.directory, lambda o=owner, b=busy: o.live(rng.randrange(b + 1)), rng.choice([1, 2, 5]))
        for _ in range(10):
            first, last = min(owner.held), max(owner.held)
            start = rng.choice([0, 0, rng.randrange(first, last + 1)])
            entries = reader.read(start)
            assert entries
            numbers = [e.offset for e in entries]
            assert numbers == list(range(numbers[0], numbers[-1] + 1))
            assert max(start, first) <= numbers[0] <= max(start, min(owner.held))
            assert last <= numbers[-1] <= max(owner.held)
            assert [e.value for e in entries] == [owner.ever[number] for number in numbers]


def test_a_reader_gets_on_however_often_all_it_has_listed_is_trimmed_before_it_reads(tmp_path):
    journal = filled(tmp_path / "journal", 20)
    left = 1000

    def renew() -> None:
        nonlocal left
        if left:
            left -= 1
            number = journal.append(b"x" * SMALL)
            journal.trim(number)

    entries = reader_of(tmp_path / "journal", renew).read()

    assert left == 0
    assert [e.offset for e in entries] == [1019]


def test_a_file_that_is_listed_but_not_there_is_refused(tmp_path):
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / f"{7:020d}.records").symlink_to("nowhere")

    with pytest.raises(ProgressError, match=r"0007\.records: No such file"):
        Journal(tmp_path / "journal").read()


def test_a_reader_beside_the_writer_sees_a_whole_chain_at_any_time(tmp_path):
    directory = tmp_path / "journal"
    journal = filled(directory, 20)
    stop = threading.Event()
    acknowledged, kept = 19, 0

    def write() -> None:
        nonlocal acknowledged, kept
        for number in itertools.count(20):
            journal.append(value(number))
            acknowledged, kept = number, number - 15
            journal.trim(kept)
            if stop.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            last = acknowledged
            entries = Journal(directory).read()
            assert entries[0].offset <= kept
            assert entries[-1].offset >= last
            assert entries[-1].offset - entries[0].offset == len(entries) - 1
            assert [e.value for e in entries] == [value(e.offset) for e in entries]
    finally:
        stop.set()
        writer.join()
    journal.close()
