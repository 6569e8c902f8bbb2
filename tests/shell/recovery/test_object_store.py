"""Generations in an object store: nothing half, nothing lost, whatever call fails and wherever the process ends."""

import itertools
import json
import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pyarrow.fs as pafs
import pytest
import torch
from fakes import PACE, Broker, Crash, Fate, Process, fingerprint, message
from objects import MemoryBucket, Trouble, object_store

from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError, CheckpointNotWritten, ConfigError, Superseded, Temporary
from streamlstm.records.batch import SeriesId
from streamlstm.recovery.background import BackgroundWriter, Failed
from streamlstm.recovery.branching import revert
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.objects import Caller
from streamlstm.recovery.progress import Link, decode_record
from streamlstm.recovery.provenance import Provenance, Settings
from streamlstm.transport.interfaces import Position


def state(step: int, series: int = 3) -> EngineState:
    torch.manual_seed(step)
    return EngineState(
        step=step,
        series=tuple(SeriesId("in", i % 2, f"s{i}") for i in range(series)),
        columns={"age": [torch.arange(series)], "carry": [torch.randn(series, 4)]},
        weights={"w": torch.randn(4, 4)},
        training={"moment": torch.randn(4)},
        meta={"queue": [1]},
    )


def provenance(step: int = 0, lineage: str = "L") -> Provenance:
    return Provenance(
        lineage=lineage,
        incarnation="i",
        positions=(Position("in", 0, step),),
        topic_ids={"in": "id"},
        progress=Link(2 * step, f"digest {step}"),
        settings=Settings("n", "hash", {}, {}),
        fingerprint=fingerprint(),
        created_ms=1_700_000_000_000,
    )


def write(store: CheckpointStore, *steps: int) -> CheckpointStore:
    for step in steps:
        store.write(state(step), provenance(step))
    return store


def prepared(*steps: int) -> dict[str, bytes]:
    objects: dict[str, bytes] = {}
    write(object_store(objects).open(), *steps)
    return objects


def sound(store: CheckpointStore) -> int:
    """The newest generation's step; everything newer is absent rather than bad, and it is what was written."""
    loaded, refused = store.newest()
    assert loaded is not None
    assert refused == []
    assert loaded.state.digests() == state(loaded.generation.step).digests()
    return loaded.generation.step


def unnamed(objects: dict[str, bytes]) -> list[str]:
    """Files that no manifest names."""
    manifests = {name for name in objects if re.search(r"/\d{20}(/MANIFEST\.json|\.bad-\d+)$", name)}
    named = {
        f"bucket/prefix/{step:020d}/{told['attempt']}/{file}"
        for told in (json.loads(objects[name]) for name in manifests)
        for step, file in itertools.product([told["step"]], [*told["files"], "MANIFEST.json"])
    }
    return sorted(set(objects) - manifests - named - {"bucket/prefix/opened-by"})


def test_what_was_written_is_loaded():
    store = object_store({}).open()
    written = store.write(state(5), provenance(5)).generation

    loaded = object_store(store._place._filesystem.handler.objects).load(5)

    assert loaded.generation == written
    assert loaded.state.digests() == state(5).digests()
    assert store.verify(5) == written
    assert store.oldest_link() == Link(10, "digest 5")


def test_the_manifest_comes_last():
    objects: dict[str, bytes] = {}
    write(object_store(objects).open(), 1)

    assert list(objects)[-1] == "bucket/prefix/00000000000000000001/MANIFEST.json"


def test_without_its_manifest_a_generation_does_not_exist():
    objects = prepared(1, 2)
    del objects["bucket/prefix/00000000000000000002/MANIFEST.json"]

    assert object_store(objects).steps() == [1]
    assert sound(object_store(objects)) == 1


def test_an_object_store_without_generations_is_a_first_run():
    assert object_store({}).open().newest() == (None, [])


@pytest.mark.parametrize("what", ["flipped", "cut", "gone", "emptied"])
def test_damage_to_any_object_is_found_and_the_previous_generation_used(what):
    objects = prepared(1, 2)
    tried = 0
    for name in [name for name in objects if re.search(r"/0+2/(MANIFEST\.json|.*/(?!MANIFEST).*)$", name)]:
        whole = objects[name]
        flipped = bytes([*whole[:-1], whole[-1] ^ 1])
        objects[name] = {"flipped": flipped, "cut": whole[:-1], "emptied": b"", "gone": b""}[what]
        if what == "gone":
            del objects[name]
        loaded, refused = object_store(objects).newest()
        assert loaded is not None
        assert loaded.generation.step == 1
        # A generation without a manifest is not there at all, and so is not bad.
        assert [r.step for r in refused] == ([] if what == "gone" and name.endswith("MANIFEST.json") else [2])
        objects[name] = whole
        tried += 1
    assert tried == 6


def test_a_bad_generation_put_aside_is_not_seen_again_and_stays_to_be_looked_at():
    objects = prepared(1, 2)
    model = next(name for name in objects if "/00000000000000000002/" in name and name.endswith("model.pt"))
    objects[model] += b"x"
    store = object_store(objects).open()

    assert store.put_aside(2) == "00000000000000000002.bad-1"
    assert (store.steps(), store.bad()) == ([1], ["00000000000000000002.bad-1"])
    write(store, 2)
    assert sound(object_store(objects)) == 2
    assert store.put_aside(2) == "00000000000000000002.bad-2"
    write(store, 3)
    object_store(objects).open()
    assert model in objects


def test_what_another_host_has_removed_or_made_anew_since_it_was_judged_is_not_put_aside():
    objects = prepared(1, 2)
    store, other = object_store(objects).open(), object_store(objects).open()
    store.load(2)
    other.put_aside(2)
    with pytest.raises(Temporary, match="another process has removed or replaced it meanwhile") as caught:
        store.put_aside(2)
    assert caught.value.exit_code == 75
    write(other, 2)
    with pytest.raises(Temporary):
        store.put_aside(2)
    assert sound(object_store(objects)) == 2


def test_wherever_putting_aside_is_cut_the_next_one_finishes_it():
    for at in itertools.count():
        objects = prepared(1, 2)
        trouble = Trouble(at)
        store = object_store(objects, trouble)
        with suppress(Crash):
            store.open().put_aside(2)
        again = object_store(objects).open()
        if 2 in again.steps():
            again.put_aside(2)
        assert (again.steps(), again.bad()) == ([1], ["00000000000000000002.bad-1"])
        if not trouble.dead:
            return


def test_one_that_was_put_aside_is_brought_back_whole():
    objects = prepared(1, 2)
    store = object_store(objects).open()
    name = store.put_aside(2)

    assert store.verify_bad(name).step == 2
    store.bring_back(name)

    assert (store.steps(), store.bad()) == ([1, 2], [])
    assert sound(object_store(objects)) == 2


def live(objects: dict[str, bytes], trouble: Trouble) -> CheckpointNotWritten | None:
    """What a process does with a store, but for the rest of the service."""
    store = object_store(objects, trouble).open()
    error = None
    for step in (2, 3):
        try:
            write(store, step)
        except CheckpointNotWritten as failed:
            error = failed
        store.prune(Keep(1))
    return error


@pytest.mark.parametrize("kind", ["kill", "error", "away"])
def test_whatever_call_fails_or_is_the_last_a_whole_generation_loads(kind):
    seen = set()
    for at in itertools.count():
        objects = prepared(1)
        trouble = Trouble(at, kind)
        error = None
        with suppress(Crash, CheckpointNotWritten):
            error = live(objects, trouble)
        if error is not None:
            assert error.exit_code == 74
            assert isinstance(error.__cause__, OSError)
        seen.add(sound(object_store(objects)))
        # Whoever comes next goes on, and what was left behind goes in the end.
        after = object_store(objects).open()
        write(after, 4, 5)
        assert after.prune(Keep(1)) == ""
        object_store(objects).open()
        assert unnamed(objects) == []
        assert sound(object_store(objects)) == 5
        if not trouble.met:
            break
    assert at > 60
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("kind", ["kill", "error", "away"])
def test_wherever_a_replacement_is_cut_one_of_the_two_is_there(kind):
    seen = set()
    for at in itertools.count():
        objects: dict[str, bytes] = {}
        object_store(objects).open().write(state(0), provenance(0, "old"))
        trouble = Trouble(at, kind)
        with suppress(Crash, CheckpointNotWritten, Temporary):
            store = object_store(objects, trouble).open()
            store.newest()
            store.write(state(0), provenance(0, "new"))
        loaded, refused = object_store(objects).newest()
        assert loaded is not None
        assert refused == []
        seen.add(loaded.generation.provenance.lineage)
        if not trouble.met:
            break
    assert seen == {"old", "new"}


def test_two_hosts_that_write_the_same_step_leave_one_of_the_two_whole():
    objects: dict[str, bytes] = {}
    first, second = object_store(objects).open(), object_store(objects).open()
    attempt = first._place.begin(7)
    with attempt.create("model.pt") as draft:
        draft.write(b"half of what the first host has")
        draft.sync()

    second.write(state(7), provenance(7, "second"))
    with pytest.raises(CheckpointNotWritten, match="another process has written a checkpoint of this step"):
        first.write(state(7), provenance(7, "first"))

    loaded, refused = object_store(objects).newest()
    assert loaded is not None
    assert (loaded.generation.provenance.lineage, refused) == ("second", [])


def test_an_upload_that_may_still_be_going_on_is_not_swept_up():
    objects = prepared(1)
    running = object_store(objects).open()._place.begin(9)
    with running.create("model.pt") as draft:
        draft.write(b"x")
        draft.sync()

    object_store(objects).open()

    assert len(unnamed(objects)) == 1


def test_the_oldest_leave_first_with_all_their_objects():
    objects = prepared(1, 2, 3)

    assert object_store(objects).open().prune(Keep(2)) == ""

    assert object_store(objects).steps() == [2, 3]
    assert not [name for name in objects if "/00000000000000000001" in name]


@pytest.mark.parametrize("kind", ["directory", "objects"])
def test_what_is_known_of_generations_does_not_outgrow_them(tmp_path, kind):
    store = (open_store(tmp_path / "state") if kind == "directory" else object_store({})).open()
    sizes: list[int] = []
    for step in range(1, 31):
        write(store, step)
        assert store.prune(Keep(2)) == ""
        held = [*vars(store).values(), *vars(store._place).values()]
        sizes.append(sum(len(known) for known in held if isinstance(known, dict | set)))

    assert len(set(sizes[5:])) == 1
    assert store.steps() == [29, 30]


def test_a_store_that_does_not_answer_condemns_no_generation():
    objects = prepared(1, 2)
    calls = Trouble()
    object_store(objects, calls).newest()
    for at in range(calls.calls):
        with pytest.raises(Temporary, match="says nothing about what is in it") as caught:
            object_store(objects, Trouble(at, "error")).newest()
        assert caught.value.exit_code == 75


def test_a_store_that_is_away_at_the_start_is_74():
    with pytest.raises(CheckpointNotWritten, match=r"^checkpoint\.url: s3://bucket/prefix: AWS Error") as caught:
        object_store({}, Trouble(0, "away")).open()
    assert caught.value.exit_code == 74


class Refusing(MemoryBucket):
    """Says this to every upload, or every call."""

    def __init__(self, said: str, *, always: bool) -> None:
        super().__init__({})
        self.said, self.always = said, always

    def get_file_info(self, paths):
        if self.always:
            raise OSError(self.said)
        return super().get_file_info(paths)

    def open_output_stream(self, path, metadata):
        raise OSError(self.said)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        "When testing for existence of bucket 'b': AWS Error ACCESS_DENIED during HeadBucket operation: no",
        "AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: no such key",
        "AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: The specified bucket does not exist",
        "google::cloud::Status(PERMISSION_DENIED: Permanent error, with a last message of no)",
        "google::cloud::Status(UNAUTHENTICATED: Permanent error)",
    ],
)
def test_a_bucket_that_is_not_ours_to_write_is_a_matter_of_configuration(said, always):
    store = object_store({}).open()
    store._place._filesystem = pafs.PyFileSystem(Refusing(said, always=always))
    store.close()

    with pytest.raises(
        ConfigError, match=r"^checkpoint\.url: s3://bucket/prefix: .*; it must be a bucket that"
    ) as told:
        store.open()
    assert told.value.exit_code == 78
    assert "\n" not in str(told.value)


def test_a_call_that_hangs_is_not_waited_for_and_the_next_attempt_succeeds():
    objects = prepared(1)
    calls = Trouble()
    write(object_store(dict(objects), calls).open(), 2)
    for at in range(0, calls.calls, 3):
        held = dict(objects)
        trouble = Trouble(at, "hang")
        began = time.monotonic()
        try:
            store = object_store(held, trouble, limit_s=0.1).open()
            writer = BackgroundWriter(store, Keep(3), start=lambda work: work())
            writer.submit(state(2), provenance(2))
            outcome = writer.poll()
            assert isinstance(outcome, Failed), at
            assert outcome.may_pass
        except CheckpointNotWritten as error:
            assert "did not answer within 0.1 s" in str(error)  # noqa: PT017, because both ends are right
        assert time.monotonic() - began < 5
        assert sound(object_store(held)) in (1, 2)
        trouble.release.set()
        assert sound(write(object_store(held).open(), 3)) == 3


def test_no_thread_is_waited_for_when_the_process_ends():
    trouble = Trouble(0, "hang")
    with pytest.raises(CheckpointNotWritten):
        object_store({}, trouble, limit_s=0.05).open()
    stuck = [thread for thread in threading.enumerate() if thread.name == "object store"]
    assert stuck
    assert all(thread.daemon for thread in stuck)
    trouble.release.set()


def test_a_thread_whose_call_was_given_up_ends_after_it_and_what_was_left_to_it():
    """Or a store that is away for hours would use up the threads that the process may have."""
    caller, late, done = Caller(limit_s=0.01), threading.Event(), threading.Event()
    threads: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()

    def hang():
        threads.put(threading.current_thread())
        late.wait()

    line = caller.line
    with pytest.raises(TimeoutError):
        caller.call(hang)
    line.put(done.set)
    assert caller.line is not line
    late.set()
    del line
    given_up = threads.get(timeout=10)
    given_up.join(10)
    assert not given_up.is_alive()
    assert done.is_set()


def test_all_bad_is_refused_with_every_reason_and_nothing_is_moved():
    objects = prepared(1, 2)
    for name in objects:
        objects[name] += b" "
    before = dict(objects)

    with pytest.raises(CheckpointError, match=r"2: MANIFEST\.json is damaged.*1: MANIFEST\.json is damaged"):
        object_store(objects).newest()
    assert objects == before


def broker() -> Broker:
    return Broker(inputs={"in": [[message(f"k{i % 4}", float(i)) for i in range(120)]]})


def test_a_service_killed_anywhere_goes_on_from_an_object_store_as_if_it_had_never_stopped():
    expected = broker()
    whole: dict[str, bytes] = {}
    fate = Fate()
    never = Process(expected, object_store(whole, fate), fate).run()
    assert len(object_store(whole).steps()) == 3
    for at in range(0, fate.calls, 7):
        killed, objects = broker(), {}
        fate = Fate(at)
        with pytest.raises(Crash):
            Process(killed, object_store(objects, fate), fate).run()
        fate = Fate()
        engine = Process(killed, object_store(objects, fate), fate).run()
        assert engine.state().digests() == never.state().digests(), at
        assert [m.value for m in killed.published] == [m.value for m in expected.published], at


def overtake(objects: dict[str, bytes], there: Broker) -> None:
    """Another host's whole life, which leaves no older generation than its newest."""
    there.inputs["in"][0] += [message(f"k{i % 4}", float(i)) for i in range(60)]
    Process(there, object_store(objects), keep=1).run()


@pytest.mark.parametrize("asked", [{}, {"fresh": True}, {"rebuild": True}])
def test_generations_that_another_host_prunes_while_we_start_are_worth_a_restart(asked):
    there, objects = broker(), {}
    Process(there, object_store(objects)).run()
    slow = Process(there, object_store(objects), **asked)
    load = slow.store.load

    def late(step):
        slow.store.load = load
        overtake(objects, there)
        return load(step)

    slow.store.load = late
    with pytest.raises(Temporary, match="another process has written or pruned") as caught:
        slow.begin()
    assert caught.value.exit_code == 75
    again = Process(there, object_store(objects))
    again.run()
    assert again.ready is not None
    assert again.ready.source == "checkpoint"


def test_a_chain_that_another_host_trimmed_before_we_read_it_is_worth_a_restart():
    there, objects = broker(), {}
    Process(there, object_store(objects)).run()
    slow = Process(there, object_store(objects))
    begin_session = slow.publisher.begin_session
    slow.publisher.begin_session = lambda: (overtake(objects, there), begin_session())[1]

    with pytest.raises(Temporary, match="another process has written or pruned"):
        slow.begin()
    Process(there, object_store(objects)).run()


def test_generations_pruned_by_a_host_that_took_over_from_us_while_we_start_end_us_for_good():
    there, objects = broker(), {}
    Process(there, object_store(objects), pace=replace(PACE, trim=False)).run()
    # The newest generation is beyond the chain, which lost its end: an older one is looked for once the chain is read.
    *_, before, newest = object_store(objects).steps()
    last = {entry: getattr(decode_record(entry), "last", 0) for entry in there.progress}
    there.progress = [entry for entry, step in last.items() if step <= before < newest]
    slow = Process(there, object_store(objects))
    read = slow.world.progress.read

    def early(start=0):
        entries = read(start)
        if start == 0:
            overtake(objects, there)
        return entries

    slow.world.progress.read = early
    with pytest.raises(Superseded) as caught:
        slow.begin()
    assert caught.value.exit_code == 76


class Meanwhile(Fate):
    """At the ``at``-th call of the process something else happens, once, and the process goes on."""

    def __init__(self, at: int, what: Callable[[], object]) -> None:
        super().__init__()
        self.when, self.what = at, what
        self.came = False

    def point(self, what: str = "") -> None:
        super().point(what)
        if self.calls == self.when and not self.came:
            self.came = True
            self.what()


def damaged(there: Broker, objects: dict[str, bytes]) -> None:
    """The newest generation is bad."""
    newest = object_store(objects).steps()[-1]
    name = next(name for name in objects if f"{newest:020d}/" in name and name.endswith("/model.pt"))
    objects[name] = bytes([objects[name][0] ^ 1]) + objects[name][1:]


def cut_short(there: Broker, objects: dict[str, bytes]) -> None:
    """The chain lost its end, and the newest generation is beyond it."""
    *_, before, newest = object_store(objects).steps()
    last = {entry: getattr(decode_record(entry), "last", 0) for entry in there.progress}
    there.progress = [entry for entry, step in last.items() if step <= before < newest]


def gone_back(there: Broker, objects: dict[str, bytes]) -> None:
    """The chain went back from the newest generation."""
    process = Process(there, object_store(objects))
    _, before, _ = process.store.steps()
    revert(process.store, process.publisher, process.world.progress, "n", before, [], process.world.new_id)


class Host(Process):
    """One that stays: it has taken the deployment over, learnt, written and pruned, and waits for more."""

    def __init__(self, there: Broker, objects: dict[str, bytes], keep: Keep) -> None:
        super().__init__(there, object_store(objects))
        self.keeps, self.idle = keep, False
        self.source.at_end = lambda: setattr(self, "idle", True)
        self.begin()
        self.learn()

    def writer(self) -> BackgroundWriter:
        return BackgroundWriter(self.store, self.keeps, start=lambda work: work())

    def learn(self) -> None:
        """What came meanwhile."""
        more(self.source.broker, 60)
        self.idle = False
        while not self.idle:
            self.daemon.turn()


def more(there: Broker, records: int) -> None:
    log = there.inputs["in"][0]
    log += [message(f"k{i % 4}", float(i)) for i in range(len(log), len(log) + records)]


def exit_code(work: Callable[[], object]) -> int:
    try:
        work()
    except (Superseded, Temporary) as error:
        return error.exit_code
    return 0


@pytest.mark.parametrize(
    ("found", "keep"),
    [(None, Keep(1)), (None, Keep(3)), (damaged, Keep(1)), (cut_short, Keep(1, 3)), (gone_back, Keep(1))],
)
def test_of_two_hosts_one_goes_on_wherever_in_its_start_up_the_other_overtakes_it(found, keep):
    """
    It ends with 76; or with 75, where it cannot tell who was first: then its restart takes over once more, and the
    other ends with 76. Never as if the bucket failed or all were lost.
    """
    unhindered = Broker({"in": [[]]})
    more(unhindered, 270)
    expected = Process(unhindered, object_store({})).run().state().digests()
    ends: set[tuple[int, ...]] = set()
    for at in itertools.count(1):
        there, objects, hosts = Broker({"in": [[]]}), {}, []
        more(there, 120)
        Process(there, object_store(objects), pace=replace(PACE, trim=False)).run()
        if found:
            found(there, objects)
        fate = Meanwhile(at, lambda to=hosts, there=there, objects=objects: to.append(Host(there, objects, keep)))
        slow = Process(there, object_store(objects, fate), fate)
        codes = [exit_code(slow.begin)]
        if not fate.came:
            break
        if codes == [0]:
            codes = [exit_code(slow.daemon.run)]
        if codes == [75]:
            codes += [exit_code(Process(there, object_store(objects)).run)]
        codes += [exit_code(hosts[0].learn)]
        ends.add(tuple(codes))

        more(there, 30)
        last = Process(there, object_store(objects)).run()
        assert last.state().digests() == expected, at
        assert {m.value for m in there.published} == {m.value for m in unhindered.published}
        if found in (None, damaged):  # else the test itself had the chain forget what was published
            assert len(there.published) == len(unhindered.published)
    assert ends == {(0, 76), (76, 0), (75, 0, 76)}
