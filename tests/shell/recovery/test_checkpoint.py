import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import textwrap
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import Crash, Fate, FatedDisk, digest_directory, fingerprint

from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError, CheckpointNotWritten, ConfigError, Temporary
from streamlstm.records.batch import SeriesId
from streamlstm.recovery import directory, snapshot
from streamlstm.recovery.archive import export, load_outside, open_outside
from streamlstm.recovery.background import BackgroundWriter
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.directory import Directory, DirectoryFiles
from streamlstm.recovery.disk import Disk
from streamlstm.recovery.progress import Link
from streamlstm.recovery.provenance import Provenance, Settings
from streamlstm.recovery.snapshot import canonical_json
from streamlstm.transport.interfaces import Frozen, Position


def state(step: int, series: int = 3) -> EngineState:
    torch.manual_seed(step)
    return EngineState(
        step=step,
        series=tuple(SeriesId("in", i % 2, f"s{i}") for i in range(series)),
        columns={"age": [torch.arange(series + 2)], "carry": [torch.randn(series + 2, 4)]},
        weights={"w": torch.randn(4, 4)},
        training={"moment": torch.randn(4)},
        meta={"queue": [1, 2.5, None, "x"]},
    )


def provenance(step: int = 0) -> Provenance:
    return Provenance(
        lineage="L",
        incarnation="i",
        positions=(Position("in", 0, step), Position("in", 1, 7)),
        topic_ids={"in": "id"},
        progress=Link(2 * step, f"digest {step}"),
        settings=Settings("n", "hash", {"model.seed": 17}, {"training.k1": 16}),
        fingerprint=fingerprint(),
        created_ms=1_700_000_000_000,
    )


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path / "state").open()
    yield opened
    opened.close()


def write(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.write(state(step), provenance(step))


def test_what_was_written_is_loaded(store):
    written = store.write(state(5), provenance(5))
    loaded = store.load(5)

    assert loaded.generation == written.generation
    assert loaded.generation.provenance == provenance(5)
    assert loaded.state.digests() == state(5).digests()
    assert loaded.state.meta == state(5).meta
    assert loaded.generation.bytes == sum(f.stat().st_size for f in store.directory.glob("0*/*"))


def test_a_partition_of_many_files_is_whole_and_any_of_them_may_be_found_damaged(store, monkeypatch):
    monkeypatch.setattr(snapshot, "_FILE_ROWS", 2)
    store.write(state(4, series=11), provenance(4))
    store.write(state(5, series=11), provenance(5))

    assert store.load(5).state.digests() == state(5, series=11).digests()
    files = sorted((store.directory / f"{5:020d}").glob("state-in-0*.parquet"))
    assert [file.name for file in files] == ["state-in-0.1.parquet", "state-in-0.2.parquet", "state-in-0.parquet"]
    files[1].write_bytes(files[1].read_bytes()[:-1])
    loaded, ((step, reason, left),) = store.newest()
    assert not left
    assert loaded is not None
    assert (loaded.generation.step, step) == (4, 5)
    assert "state-in-0.2.parquet" in reason


def test_a_state_without_series_keeps_its_columns(store):
    store.write(state(0, series=0), provenance())

    assert store.load(0).state.digests() == state(0, series=0).digests()


def test_a_table_that_has_no_chunk_yet_stays_one(store):
    empty = EngineState(0, (), {"h": [], "n": []}, {"w": torch.ones(2)}, {}, {})
    store.write(empty, provenance())

    assert store.load(0).state.columns == {"h": [], "n": []}


def test_what_goes_beside_the_state_comes_back_with_it(store):
    beside = Frozen({"lengths": [3]}, {"open": np.arange(3.0)})
    store.write(state(1), provenance(), beside)
    write(store, 2)

    loaded = store.load(1).beside

    assert loaded is not None
    assert loaded.values == beside.values
    assert np.array_equal(loaded.arrays["open"], beside.arrays["open"])
    assert store.load(2).beside is None


def test_what_a_generation_speaks_of_is_made_durable_before_it_and_in_the_same_thread(store):
    seen: list[list[int]] = []
    writer = BackgroundWriter(store, Keep(3), start=lambda work: work())

    writer.submit(state(1), provenance(), before=lambda: seen.append(store.steps()))

    assert writer.poll() is not None
    assert (seen, store.steps()) == ([[]], [1])


def test_only_we_can_read_it(store):
    write(store, 1)

    for path in (store.directory, *store.directory.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_topic_may_be_called_anything(store):
    topics = ["../../etc", "a/b", "ü" * 100, "x" * 249, "y" * 249 + "/", "CON", "."]
    series = tuple(SeriesId(topic, 3, "k") for topic in topics)
    odd = EngineState(1, series, {"n": [torch.arange(len(topics))]}, {}, {}, {})

    store.write(odd, provenance())

    assert store.load(1).state.digests() == odd.digests()
    assert all(path.parent.parent == store.directory for path in store.directory.rglob("state-*"))


def test_the_newest_is_taken_whatever_the_order_of_writing(store):
    write(store, 9, 11, 10)

    loaded, refused = store.newest()

    assert loaded is not None
    assert loaded.generation.step == 11
    assert refused == []


def test_an_empty_directory_holds_nothing(store):
    assert store.newest() == (None, [])


def damages(path: Path, rng: random.Random) -> list[tuple[str, bytes | None]]:
    """What to put in place of a file: flipped bits, cut ends, a longer one, an empty one, none."""
    data = path.read_bytes()
    every = range(len(data)) if len(data) <= 400 else sorted(rng.sample(range(len(data)), 120))
    found: list[tuple[str, bytes | None]] = []
    for at in every:
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.randrange(8)
        found.append((f"bit of byte {at}", bytes(flipped)))
    found += [(f"cut to {size}", data[:size]) for size in (0, 1, len(data) // 2, len(data) - 1)]
    return [*found, ("one byte more", data + b"\0"), ("removed", None)]


def test_any_damage_to_any_file_is_found_and_the_previous_generation_used(store):
    write(store, 1, 2)
    rng = random.Random(17)
    newest = store.directory / f"{2:020d}"
    tried = 0
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for what, data in damages(path, rng):
            path.unlink() if data is None else path.write_bytes(data)
            loaded, refused = store.newest()
            assert loaded is not None, (path.name, what)
            assert loaded.generation.step == 1, (path.name, what)
            assert [r.step for r in refused] == [2], (path.name, what)
            path.write_bytes(whole)
            tried += 1
    assert tried > 500
    assert store.newest()[1] == []


def test_the_reason_names_the_file(store):
    write(store, 1, 2)
    path = store.directory / f"{2:020d}" / "optim.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    _, (refused,) = store.newest()

    assert refused.reason == "optim.pt is damaged: its SHA-256 is not the manifest's"


def test_a_manifest_spelled_otherwise_is_damaged(store):
    write(store, 1)
    path = store.directory / f"{1:020d}" / "MANIFEST.json"
    path.write_bytes(path.read_bytes().replace(b",", b", ", 1))

    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged"):
        store.verify(1)


def reseal(path: Path, meta: object = None, **said: object) -> None:
    """Other content, with hashes that are right."""
    sealed = json.loads((path / "MANIFEST.json").read_bytes()) | said
    if meta is not None:
        data = canonical_json(meta)
        (path / "meta.json").write_bytes(data)
        sealed["files"]["meta.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    del sealed["sha256"]
    sealed["sha256"] = hashlib.sha256(canonical_json(sealed)).hexdigest()
    (path / "MANIFEST.json").write_bytes(canonical_json(sealed))


@pytest.mark.parametrize(
    "said",
    [{"meta": []}, {"meta": {"columns": {}}}, {"meta": "x"}, {"files": []}, {"files": {"meta.json": {}}}, {"step": []}],
    ids=str,
)
def test_a_generation_of_another_shape_is_bad_however_right_its_hashes(store, said):
    write(store, 1, 2)
    reseal(store.directory / f"{2:020d}", **said)

    loaded, refused = store.newest()

    assert loaded is not None
    assert (loaded.generation.step, [r.step for r in refused]) == (1, [2])
    with pytest.raises(CheckpointError):
        store.verify(2)


META = [
    ("step", "2"),
    ("step", 2.0),
    ("step", -2),
    ("step", 3),
    ("series", True),
    ("series", 4),
    ("created_ms", "now"),
    ("created_ms", 1 << 70),
    ("lineage", 7),
    ("incarnation", None),
    ("positions", {}),
    ("positions", [["in", 0, 5]]),
    ("positions", [{"topic": "in", "partition": "0", "next_offset": 5, "leader_epoch": None}]),
    ("positions", [{"topic": "in", "partition": 0, "next_offset": -5, "leader_epoch": None}]),
    ("topic_ids", {"in": 1}),
    ("progress", {"offset": "1", "digest": "d"}),
    ("config", {"name": "n", "hash": "other", "identity": {}, "learning": {}}),
    ("config", {"name": "n", "hash": "hash", "identity": [], "learning": {}}),
    ("columns", {"age": {"dtype": 3, "shape": []}}),
    ("columns", {"age": {"dtype": "int64", "shape": [-1]}}),
    ("columns", {"age": {"dtype": "no_such", "shape": []}}),
    ("state", []),
    ("unheard_of", 1),
]


@pytest.mark.parametrize(("name", "value"), META, ids=str)
def test_a_wrong_type_in_meta_makes_a_generation_bad_however_right_its_hash(store, name, value):
    write(store, 1, 2)
    path = store.directory / f"{2:020d}"
    reseal(path, json.loads((path / "meta.json").read_bytes()) | {name: value})

    loaded, refused = store.newest()

    assert loaded is not None
    assert (loaded.generation.step, [r.step for r in refused]) == (1, [2])


@pytest.mark.parametrize(
    "said",
    [
        {"schema": "1"},
        {"schema": 0},
        {"schema": True},
        {"step": 2.0},
        {"config": 1},
        {"fingerprint": {"cpu": 1}},
        {"attempt": "../../else"},
        {"files": {"../x": {"bytes": 0, "sha256": "0" * 64}}},
        {"files": {"x": {"bytes": 0, "sha256": "0" * 63}}},
        {"files": {"x": {"bytes": -1, "sha256": "0" * 64}}},
        {"unheard_of": 1},
    ],
    ids=str,
)
def test_a_wrong_type_in_the_manifest_makes_a_generation_bad_however_right_its_seal(store, said):
    write(store, 1, 2)
    path = store.directory / f"{2:020d}"
    files = json.loads((path / "MANIFEST.json").read_bytes())["files"]
    reseal(path, **(said | {"files": files | said["files"]} if "files" in said else said))

    loaded, refused = store.newest()

    assert loaded is not None
    assert (loaded.generation.step, [r.step for r in refused]) == (1, [2])


def test_a_file_that_is_not_listed_is_not_tolerated(store):
    write(store, 1)
    (store.directory / f"{1:020d}" / "extra.pt").write_bytes(b"")

    with pytest.raises(CheckpointError, match=r"extra\.pt is not listed"):
        store.verify(1)


@pytest.mark.parametrize("name", ["MANIFEST.json", "model.pt", "meta.json"])
def test_a_link_is_not_followed_even_to_the_right_bytes(store, tmp_path, name):
    write(store, 1)
    path = store.directory / f"{1:020d}" / name
    shutil.move(path, tmp_path / name)
    path.symlink_to(tmp_path / name)

    with pytest.raises(CheckpointError, match=f"{name} is a link"):
        store.verify(1)


def test_a_linked_generation_is_not_followed(store, tmp_path):
    write(store, 1)
    shutil.move(store.directory / f"{1:020d}", tmp_path / "elsewhere")
    (store.directory / f"{1:020d}").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match="not a directory"):
        store.verify(1)


def test_a_generation_under_another_steps_name_is_refused(store):
    write(store, 1)
    (store.directory / f"{1:020d}").rename(store.directory / f"{4:020d}")

    with pytest.raises(CheckpointError, match="is of step 1"):
        store.verify(4)


def test_no_parser_sees_a_byte_that_was_not_checked(store):
    write(store, 1)
    bomb = b"PK\x03\x04 a zip that torch would open"
    (store.directory / f"{1:020d}" / "model.pt").write_bytes(bomb)

    with pytest.raises(CheckpointError, match=r"model\.pt has"):
        store.load(1)


def test_a_newer_layout_is_refused_not_called_bad(store):
    write(store, 1)
    write(store, 2)
    reseal(store.directory / f"{2:020d}", schema=2, something="that layout 1 does not have")

    with pytest.raises(CheckpointError, match="step 2: the checkpoint has layout 2, and this version reads up to 1"):
        store.newest()


def test_all_bad_is_refused_with_every_reason_and_nothing_is_moved(store):
    write(store, 1, 2)
    (store.directory / f"{1:020d}" / "model.pt").unlink()
    (store.directory / f"{2:020d}" / "MANIFEST.json").write_bytes(b"{}")
    before = digest_directory(store.directory)

    with pytest.raises(CheckpointError) as caught:
        store.newest()

    assert caught.value.exit_code == 65
    assert "2: MANIFEST.json is damaged" in str(caught.value)
    assert "1: model.pt is missing" in str(caught.value)
    assert digest_directory(store.directory) == before


def test_a_bad_generation_put_aside_is_not_seen_again(store):
    write(store, 1, 2)
    for expected in ("00000000000000000002.bad-1", "00000000000000000002.bad-2"):
        assert store.put_aside(2) == expected
        assert store.steps() == [1]
        write(store, 2)
    assert store.bad() == ["00000000000000000002.bad-1", "00000000000000000002.bad-2"]


def test_the_oldest_leave_first_and_the_newest_never(store):
    write(store, 1, 2, 3, 4)

    assert store.prune(Keep(2)) == ""
    assert store.steps() == [3, 4]
    assert store.prune(Keep(1)) == ""
    assert store.steps() == [4]


DAY = 86_400_000


def write_on(store: CheckpointStore, days: dict[int, float]) -> None:
    """Generations by step, each made at this time, in days."""
    for step, day in days.items():
        store.write(state(step), replace(provenance(step), created_ms=int((20_000 + day) * DAY)))


@pytest.mark.parametrize(
    ("days", "keep", "left"),
    [
        ({1: 0.0, 2: 0.9, 3: 1.0, 4: 1.5, 5: 1.99, 6: 2.0}, Keep(1, 3), [2, 5, 6]),
        ({1: 0.0, 2: 0.9, 3: 1.0, 4: 1.5, 5: 1.99, 6: 2.0}, Keep(2, 2), [5, 6]),
        ({1: 0.0, 2: 0.9, 3: 1.0, 4: 1.5, 5: 1.99, 6: 2.0}, Keep(3, 0), [4, 5, 6]),
        ({1: 0.0, 2: 100.0, 3: 100.1, 4: 300.0}, Keep(1, 3), [1, 3, 4]),
        ({1: 5.0, 2: 0.0, 3: 0.5}, Keep(1, 2), [1, 3]),
    ],
    ids=[
        "a day begins at midnight",
        "last and daily overlap",
        "no daily",
        "days without one do not count",
        "a clock back",
    ],
)
def test_the_newest_stay_and_the_newest_of_each_of_the_last_days(store, days, keep, left):
    write_on(store, days)

    going = store.surplus(keep)

    assert [int(name) for name in going] == [step for step in days if step not in left]
    assert store.steps() == list(days)
    assert store.prune(keep) == ""
    assert store.steps() == left
    other = CheckpointStore(store._place)
    assert other.surplus(keep) == []


def test_the_newest_whole_generation_is_never_removed(store):
    write(store, 1, 2, 3, 4)
    for step in (3, 4):
        (store.directory / f"{step:020d}" / "model.pt").write_bytes(b"")

    assert CheckpointStore(store._place).prune(Keep(1)) == ""

    assert store.steps() == [2, 4]


def test_a_stamp_is_read_once_in_a_processs_life(store, tmp_path):
    write_on(store, {step: step / 10 for step in range(1, 9)})
    reads: list[int] = []

    class Counting(Directory):
        def files(self, step: int) -> DirectoryFiles:
            reads.append(step)
            return super().files(step)

    other = CheckpointStore(Counting(store.directory))
    other.surplus(Keep(2, 3))
    first = len(reads)
    other.surplus(Keep(2, 3))

    assert first == 9  # every stamp, and the newest generation as a whole
    assert len(reads) == first


def test_the_chain_is_needed_from_the_oldest_generation_on(store):
    assert store.oldest_link() is None
    write(store, 3, 4)
    assert store.oldest_link() == Link(6, "digest 3")
    (store.directory / f"{3:020d}" / "meta.json").write_bytes(b"{}")
    assert store.oldest_link() is None


def test_what_a_killed_process_left_is_swept_up(store):
    write(store, 1)
    shutil.copytree(store.directory / f"{1:020d}", store.directory / ".tmp-00000000000000000002-1")
    store.close()

    again = open_store(store.directory).open()
    assert sorted(p.name for p in store.directory.iterdir()) == [f"{1:020d}", "lock"]
    again.close()


@pytest.mark.parametrize("what", ["file", "link to a directory", "link to nothing"])
def test_what_is_called_unfinished_and_is_no_directory_is_swept_up_too(tmp_path, what):
    directory, other = tmp_path / "state", tmp_path / "other"
    directory.mkdir()
    other.mkdir()
    (other / "kept").touch()
    odd = directory / ".tmp-odd"
    if what == "file":
        odd.touch()
    else:
        odd.symlink_to(other if what == "link to a directory" else tmp_path / "none")

    open_store(directory).open().close()

    assert [p.name for p in directory.iterdir()] == ["lock"]
    assert (other / "kept").exists()


def test_a_second_process_is_told_who_holds_the_lock(store):
    with pytest.raises(Temporary, match=f"in use by another process \\(pid {os.getpid()}\\)") as caught:
        open_store(store.directory).open()
    assert caught.value.exit_code == 75


def test_a_directory_that_was_made_for_nothing_is_left_as_if_it_had_never_been(tmp_path):
    store = open_store(tmp_path / "made").open()
    store.leave()
    assert not (tmp_path / "made").exists()
    store.open()
    store.write(state(1), provenance(1))
    store.leave()
    assert open_store(tmp_path / "made").open().newest()[0] is not None


def test_a_directory_that_was_there_is_left_there(tmp_path):
    (tmp_path / "there").mkdir()
    open_store(tmp_path / "there").open().leave()
    assert (tmp_path / "there").is_dir()


def test_a_lock_that_goes_with_its_directory_is_nobody_s(tmp_path):
    """Two processes, of which one opens the lock before the other has left, and takes it afterwards."""
    one, other = Directory(tmp_path / "state"), Directory(tmp_path / "state")
    one.open()
    opened = other._open_lock()
    one.leave()
    with pytest.raises(Temporary, match="is being left by another process; start again"):
        other._take_lock(opened)
    one.open()
    opened = other._open_lock()
    one.leave()
    third = Directory(tmp_path / "state")
    third.open()
    with pytest.raises(Temporary, match="is being left by another process; start again"):
        other._take_lock(opened)
    third.leave()
    other.open()
    other.close()


def test_the_lock_ends_with_its_process(tmp_path):
    script = textwrap.dedent(
        f"""
        from pathlib import Path
        from streamlstm.recovery.checkpoint import open_store
        open_store(Path({str(tmp_path / "state")!r})).open()
        print("locked", flush=True)
        import time
        time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(Temporary):
            open_store(tmp_path / "state").open()
        child.kill()
    open_store(tmp_path / "state").open().close()


def a_file(root: Path) -> Path:
    (root / "file").write_text("")
    return root / "file"


class Unwritable(Disk):
    """Every new name is refused, as on a read-only file system."""

    def make_directory(self, path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


@pytest.mark.parametrize(
    ("prepare", "disk"),
    [
        (lambda root: root / "missing" / "state", Disk()),
        (a_file, Disk()),
        (lambda root: root / "state", Unwritable()),
    ],
    ids=["no parent", "a file", "read-only"],
)
def test_a_directory_that_cannot_be_used_is_a_matter_of_configuration(tmp_path, prepare, disk):
    with pytest.raises(ConfigError, match=r"^checkpoint\.url: ") as caught:
        open_store(prepare(tmp_path), disk).open()
    assert caught.value.exit_code == 78
    assert "\n" not in str(caught.value)


class Failing(FatedDisk):
    """The ``at``-th operation fails with this error, and the process lives on."""

    def __init__(self, at: int, number: int) -> None:
        super().__init__(Fate())
        self.at, self.number = at, number
        self.failed = False
        self.fate.point = self.point  # type: ignore[method-assign]  # the one seam of all operations
        self.count = 0

    def point(self) -> None:
        self.count += 1
        if self.count == self.at:
            self.failed = True
            raise OSError(self.number, os.strerror(self.number))


def attempt(store: CheckpointStore) -> CheckpointNotWritten | None:
    try:
        store.write(state(2), provenance(2))
    except CheckpointNotWritten as error:
        return error
    return None


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_whichever_operation_fails_the_previous_generation_loads(tmp_path, number):
    at = 0
    while True:
        at += 1
        directory = tmp_path / f"{at}"
        first = open_store(directory).open()
        write(first, 1)
        first.close()
        disk = Failing(0, number)
        store = open_store(directory, disk).open()
        disk.at, disk.count = at, 0
        error = attempt(store)
        if error is None:
            assert not disk.failed
            store.close()
            break
        assert error.exit_code == 74
        assert isinstance(error.__cause__, OSError)
        loaded, refused = store.newest()
        assert loaded is not None
        assert refused == []
        assert loaded.state.digests() == state(loaded.generation.step).digests()
        # The attempt is gone, and the next one begins from nothing.
        assert not list(directory.glob(".tmp-*"))
        store.write(state(3), provenance(3))
        assert store.load(3).state.digests() == state(3).digests()
        store.close()
    assert at > 20


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_whichever_operation_of_looking_after_it_fails_nothing_that_is_whole_is_lost(tmp_path, number):
    """Opening with leftovers, putting aside, pruning: each operation fails once, and doing it again mends it."""
    for at in itertools.count(1):
        directory = tmp_path / f"{at}"
        first = open_store(directory).open()
        write(first, 1, 2, 3, 4)
        first.close()
        shutil.copytree(directory / f"{4:020d}", directory / ".tmp-00000000000000000005-1")
        (directory / f"{4:020d}" / "model.pt").write_bytes(b"")
        disk = Failing(at, number)
        store = open_store(directory, disk)
        with suppress(ConfigError, CheckpointNotWritten):
            store.open()
            store.put_aside(4)
            store.prune(Keep(1))
        store.close()
        again = open_store(directory).open()
        if 4 in again.steps():
            again.put_aside(4)
        loaded, refused = again.newest()
        assert loaded is not None
        assert (loaded.generation.step, refused) == (3, [])
        assert again.prune(Keep(1)) == ""
        assert (again.steps(), len(again.bad())) == ([3], 1)
        again.close()
        if not disk.failed:
            break
    assert at > 6


def test_wherever_the_process_is_killed_the_previous_generation_loads(tmp_path):
    seen = set()
    at = 0
    while True:
        directory = tmp_path / f"{at}"
        first = open_store(directory).open()
        write(first, 1)
        first.close()
        store = open_store(directory, FatedDisk(Fate(at)))
        try:
            store.open()
            store.write(state(2), provenance(2))
            store.prune(Keep(1))
            finished = True
        except Crash:
            finished = False
        store.close()
        again = open_store(directory).open()
        loaded, refused = again.newest()
        assert loaded is not None
        assert refused == []
        assert loaded.state.digests() == state(loaded.generation.step).digests()
        assert not list(directory.glob(".tmp-*"))
        again.close()
        seen.add(loaded.generation.step)
        if finished:
            break
        at += 1
    assert at > 20
    assert seen == {1, 2}


def test_wherever_a_replacement_is_cut_one_of_the_two_is_there(tmp_path):
    for at in range(200):
        directory = tmp_path / f"{at}"
        first = open_store(directory).open()
        old = first.write(state(0), provenance(1)).generation
        first.close()
        store = open_store(directory, FatedDisk(Fate(at)))
        try:
            store.open()
            store.write(state(0), provenance(2))
            finished = True
        except Crash:
            finished = False
        store.close()
        again = open_store(directory).open()
        loaded, _ = again.newest()
        assert loaded is not None
        assert (loaded.generation.digest == old.digest) == (loaded.generation.provenance == provenance(1))
        assert sorted(p.name for p in directory.iterdir()) == [f"{0:020d}", "lock"]
        again.close()
        if finished:
            assert loaded.generation.provenance == provenance(2)
            return
    pytest.fail("the replacement never came to its end")


def test_whichever_operation_of_a_replacement_fails_one_of_the_two_is_there(tmp_path):
    for at in itertools.count(1):
        directory = tmp_path / f"{at}"
        first = open_store(directory).open()
        first.write(state(2), provenance(1))
        first.close()
        disk = Failing(0, errno.ENOSPC)
        store = open_store(directory, disk).open()
        disk.at, disk.count = at, 0
        error = attempt(store)
        loaded, refused = store.newest()
        assert loaded is not None
        assert refused == []
        assert loaded.generation.provenance in (provenance(1), provenance(2))
        store.close()
        if error is None:
            break
    assert not disk.failed


def test_meta_says_where_it_stands(store):
    write(store, 5)

    meta = json.loads((store.directory / f"{5:020d}" / "meta.json").read_bytes())

    assert meta["positions"][0] == {"topic": "in", "partition": 0, "next_offset": 5, "leader_epoch": None}
    assert meta["progress"] == {"offset": 10, "digest": "digest 5"}
    assert meta["config"]["learning"] == {"training.k1": 16}


class Interrupted(Directory):
    """Somebody else does something between two of its steps."""

    meanwhile = staticmethod(lambda: None)

    def _open_lock(self):
        self.meanwhile()
        return super()._open_lock()


def test_a_directory_that_is_just_being_left_is_to_be_tried_again(tmp_path):
    leaving = open_store(tmp_path / "state").open()
    coming = Interrupted(tmp_path / "state")
    coming.meanwhile = leaving.leave
    with pytest.raises(Temporary, match="is being left by another process"):
        coming.open()
    coming.meanwhile = lambda: None
    coming.open()
    coming.leave()


def test_a_directory_that_cannot_be_looked_into_any_more_is_let_go_of(tmp_path, monkeypatch):
    store = open_store(tmp_path / "state").open()

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(directory, "_names", broken)
        store.leave()
    open_store(tmp_path / "state").open().close()


def test_an_archive_of_many_files_is_read_whole_every_time(tmp_path, store, monkeypatch):
    monkeypatch.setattr(snapshot, "_FILE_ROWS", 20)
    made = state(5, series=400)
    store.write(made, provenance(5))
    export(store, 5, tmp_path / "a.tar")
    for _ in range(20):
        with open_outside(tmp_path / "a.tar") as outside:
            assert load_outside(outside, "a.tar").state.digests() == made.digests()
