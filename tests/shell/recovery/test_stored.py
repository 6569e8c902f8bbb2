"""Series beyond memory: what leaves, waits on the disk and returns shows in no bit."""

import dataclasses
import itertools
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import streams
import torch
from fakes import PACE, Broker, Crash, Fate, Process, fingerprint
from hypothesis import given
from hypothesis import strategies as st
from objects import object_store

from streamlstm.engine.core import Engine
from streamlstm.engine.relayout import Layout, relayout
from streamlstm.engine.state import EngineState, pack, unpack
from streamlstm.errors import CheckpointError, Temporary
from streamlstm.records.batch import SeriesId
from streamlstm.recovery.checkpoint import CheckpointStore, Keep, open_store
from streamlstm.recovery.making import EngineMaker
from streamlstm.recovery.progress import Link
from streamlstm.recovery.provenance import Provenance, Settings
from streamlstm.recovery.stored import Room, TieredEngine
from streamlstm.series.table import Rows
from streamlstm.transport.interfaces import Position

SERIES, ROOM = 30, 5


def config(most=ROOM, **series):
    return streams.small_config(
        training={"max_wait": ROOM, "k2": 7}, series={"max_series": most, **series}, model={"hidden_size": 3}
    )


def tiered(tmp_path: Path, **series) -> TieredEngine:
    return TieredEngine(Engine.create(config(**series), "cpu"), Room(tmp_path))


def feed(engine, batch, start, end, size=20):
    return [engine.step(streams.part(batch, at, min(end, at + size))) for at in range(start, end, size)]


def stream(count=400, seed=3):
    return streams.random_batch(seed, count, SERIES, "mixed")


def provenance(step: int) -> Provenance:
    return Provenance(
        lineage="L",
        incarnation="i",
        positions=(Position("in", 0, step),),
        topic_ids={"in": "id"},
        progress=Link(step, f"digest {step}"),
        settings=Settings("n", "hash", {}, {}),
        fingerprint=fingerprint(),
        created_ms=1,
    )


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path / "state").open()
    yield opened
    opened.close()


def restored(tmp_path, state: EngineState, **series) -> TieredEngine:
    return TieredEngine.of(Engine.restore(config(**series), "cpu", state), Room(tmp_path), state)


@pytest.mark.parametrize("ttl", [None, "100s"])
def test_no_bit_depends_on_who_is_in_memory(tmp_path, ttl):
    batch = stream()
    always = Engine.create(config(10**6, ttl=ttl), "cpu")
    expected = feed(always, batch, 0, 400, 400)
    engine = tiered(tmp_path, ttl=ttl)
    reports = feed(engine, batch, 0, 400)

    assert streams.outputs(reports) == streams.outputs(expected)
    assert engine.state().digests() == always.state().digests()
    assert all(report.series_total <= ROOM for report in reports)
    assert sum(report.evictions["capacity"] for report in reports) > 200
    assert reports[-1].series_stored > 10
    assert (sum(report.evictions["ttl"] for report in expected) > 10) == (ttl is not None)


@pytest.mark.parametrize("ttl", [None, "100s"])
@pytest.mark.parametrize("every", [40, 100])
def test_a_checkpoint_holds_what_is_stored_and_an_engine_goes_on_from_it(tmp_path, store, ttl, every):
    """Several generations, each restored into another process's memory and scratch file."""
    batch = stream()
    always, engine = Engine.create(config(10**6, ttl=ttl), "cpu"), tiered(tmp_path, ttl=ttl)
    for start in range(0, 400, every):
        feed(always, batch, start, start + every)
        report = feed(engine, batch, start, start + every)[-1]
        updates, *counts = engine.census()
        assert counts == [report.series_total, report.series_warming, report.series_stored]
        state = engine.state()
        store.write(state, provenance(state.step))
        store.prune(Keep(2))
        loaded = store.newest()[0]
        assert loaded is not None
        assert loaded.state.digests() == state.digests() == always.state().digests()
        counts = loaded.generation.series, loaded.generation.stored
        assert counts == (len(state.series), sum(len(rows) for rows in loaded.state.rows()) - len(state.series))
        if start % (2 * every) == 0:
            engine = restored(tmp_path, loaded.state, ttl=ttl)
            assert engine.census().updates == updates


def left(store: CheckpointStore, step: int) -> dict[str, int]:
    return {file.name: file.rows for file in store.header(step).files_left}


def test_a_generation_writes_who_left_since_and_links_the_rest(tmp_path, store):
    batch, engine = stream(), tiered(tmp_path)
    feed(engine, batch, 0, 200)
    store.write(engine.state(), provenance(10))
    feed(engine, batch, 200, 220)
    store.write(engine.state(), provenance(11))

    first, second = left(store, 10), left(store, 11)
    assert [*first] == ["stored-in-0-10.parquet"]
    assert [*second] == ["stored-in-0-10.parquet", "stored-in-0-11.parquet"]
    paths = [store.directory / f"{step:020d}" / "stored-in-0-10.parquet" for step in (10, 11)]
    assert paths[0].samefile(paths[1])
    assert sum(second.values()) > store.header(11).generation.stored  # some have returned since, or left again
    assert second["stored-in-0-11.parquet"] < first["stored-in-0-10.parquet"]
    store.prune(Keep(1))
    assert store.load(11).state.digests() == engine.state().digests()


def test_after_a_restart_the_files_of_the_generation_it_began_from_are_linked_too(tmp_path, store):
    batch, engine = stream(), tiered(tmp_path)
    feed(engine, batch, 0, 200)
    store.write(engine.state(), provenance(10))
    store.close()
    again = open_store(store.directory).open()
    engine = restored(tmp_path, again.load(10).state)
    feed(engine, batch, 200, 220)
    again.write(engine.state(), provenance(11))
    assert [*left(again, 11)] == ["stored-in-0-10.parquet", "stored-in-0-11.parquet"]
    assert again.load(11).state.digests() == engine.state().digests()
    again.close()


def test_files_that_hold_twice_what_counts_are_written_anew(tmp_path, store):
    batch, engine = stream(600), tiered(tmp_path)
    most, alone = 0, 0
    for start in range(0, 600, 40):
        feed(engine, batch, start, start + 40)
        state = engine.state()
        store.write(state, provenance(state.step))
        files = left(store, state.step)
        live = sum(len(rows) for rows in state.stored.rows("in", 0)) if state.stored else 0
        assert sum(files.values()) <= 2 * live
        most, alone = max(most, len(files)), alone + (len(files) == 1)
    assert most > 1
    assert alone > 1


def test_damage_to_a_file_of_stored_series_is_found(tmp_path, store):
    batch, engine = stream(), tiered(tmp_path)
    feed(engine, batch, 0, 200)
    store.write(engine.state(), provenance(10))
    (name,) = left(store, 10)
    path = store.directory / f"{10:020d}" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    for look in (store.load, store.verify):
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            look(10)


def test_a_snapshot_holds_what_was_stored_at_its_step(tmp_path):
    batch, engine = stream(), tiered(tmp_path)
    feed(engine, batch, 0, 200)
    state = engine.state()
    before = state.digests()
    feed(engine, batch, 200, 400)
    assert state.digests() == before


def test_with_more_room_who_must_be_in_memory_comes_back_into_it(tmp_path):
    """A longer max_wait counts series for the queue that have left by the shorter one."""
    batch, engine = stream(), tiered(tmp_path)
    feed(engine, batch, 0, 200)
    wide = streams.small_config(training={"max_wait": 40, "k2": 7}, series={"max_series": 40}, model={"hidden_size": 3})
    always = Engine.create(config(10**6), "cpu")
    feed(always, batch, 0, 200)
    expected = Engine.restore(wide, "cpu", always.state())
    state = engine.state()
    other = TieredEngine.of(Engine.restore(wide, "cpu", state), Room(tmp_path), state)
    assert streams.outputs(feed(other, batch, 200, 400)) == streams.outputs(feed(expected, batch, 200, 400))
    assert other.state().digests() == expected.state().digests()


def test_what_is_stored_is_laid_out_anew_with_the_rest(tmp_path):
    batch, engine = stream(), tiered(tmp_path)
    always = Engine.create(config(10**6), "cpu")
    feed(always, batch, 0, 200)
    feed(engine, batch, 0, 200)
    now = streams.small_config(
        training={"max_wait": ROOM, "k1": 3, "k2": 8}, series={"max_series": ROOM}, model={"hidden_size": 3}
    )
    layouts = Layout(4, 7), Layout(3, 8)
    expected = Engine.restore(now, "cpu", relayout(always.state(), *layouts).state)
    state = relayout(engine.state(), *layouts).state
    other = TieredEngine.of(Engine.restore(now, "cpu", state), Room(tmp_path), state)
    feed(expected, batch, 200, 300)
    feed(other, batch, 200, 300)
    assert other.state().digests() == expected.state().digests()


def test_nothing_is_made_while_there_is_room_and_all_is_removed_with_the_engine(tmp_path):
    room = tmp_path / "scratch"
    engine = TieredEngine(Engine.create(config(1000), "cpu"), Room(room))
    feed(engine, stream(), 0, 200)
    assert not room.exists()
    engine = TieredEngine(Engine.create(config(), "cpu"), Room(room))
    feed(engine, stream(), 0, 200)
    (path,) = room.glob("*.sqlite")
    assert path.stat().st_mode & 0o077 == 0
    del engine
    assert list(room.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in ("stored-abc.sqlite", "stored-abc.sqlite-wal", "other"):
        (tmp_path / name).touch()
    Room(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_row_that_is_not_what_it_was_ends_the_process_for_a_restart(tmp_path):
    batch, engine = stream(), tiered(tmp_path)
    feed(engine, batch, 0, 200)
    (path,) = tmp_path.glob("*.sqlite")
    with sqlite3.connect(path) as other:
        other.execute("UPDATE stored SET row = zeroblob(length(row))")
    with pytest.raises(Temporary, match="is damaged: a series stored there is not what it was"):
        feed(engine, batch, 200, 400)


def test_a_scratch_file_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    engine = TieredEngine(Engine.create(config(), "cpu"), Room(tmp_path / "file"))
    with pytest.raises(Temporary, match=r"no directory for series beyond series\.max_series"):
        feed(engine, stream(), 0, 200)


@given(st.integers(0, 5), st.lists(st.lists(st.integers(0, 3), max_size=2), min_size=1, max_size=4), st.data())
def test_what_was_packed_is_unpacked(count, shapes, data):
    kinds = st.sampled_from([torch.int64, torch.float32, torch.float64, torch.bool, torch.bfloat16])
    columns = {f"c{i}": (torch.randn(count, *shape) * 9).to(data.draw(kinds)) for i, shape in enumerate(shapes)}
    again = unpack(pack(columns), {name: values[:0] for name, values in columns.items()})
    assert all(torch.equal(again[name], values) for name, values in columns.items())


@pytest.mark.parametrize("key", ["", "a\0b", "ü", "\ud800", "x" * 1000])
def test_a_key_may_be_anything(tmp_path, key):
    one = SeriesId("in", 3, key)
    rows = Rows((one,), {"seen_ns": torch.tensor([7]), "h": torch.randn(1, 3)})
    scratch = Room(tmp_path).scratch(rows.columns)
    scratch.put(rows, 1)
    view = scratch.view(None, "")
    assert view is not None
    (seen,) = view.rows("in", 3)
    back = scratch.fetch([one, SeriesId("in", 2, key)])
    assert back is not None
    assert back.series == seen.series == (one,)
    assert torch.equal(back.columns["h"], rows.columns["h"])
    assert len(scratch) == 0
    assert np.array_equal(seen.columns["seen_ns"], [7])


def test_what_is_to_be_dropped_does_not_pile_up_however_many_leave_at_once(tmp_path):
    """No series is ever seen again, and by each step 9000 of them leave that are past their time."""
    engine = tiered(tmp_path, ttl="1s")
    stored = []
    for number in range(8):
        code = np.arange(number * 9000, number * 9000 + 9000)
        when = np.full(9000, number + 1) * 10 * streams.SECOND
        stored.append(engine.step(streams.batch_of(code, when, np.ones(9000), offset=code)).series_stored)
    assert max(stored) < 20_000


def test_a_checkpoint_of_a_new_scratch_file_asks_no_older_one(tmp_path):
    objects: dict[str, bytes] = {}
    first, second = tiered(tmp_path / "a"), tiered(tmp_path / "b")
    written = object_store(objects).open()
    for engine in (first, second):
        feed(engine, stream(), 0, 200 if engine is first else 220)
    written.write(first.state(), provenance(first.step_number))
    written.close()
    asked = object_store(objects).open()
    headers = []
    asked.header = headers.append
    asked.write(second.state(), provenance(second.step_number))
    assert headers == []


def test_memory_stays_flat_while_keys_go_on_and_on(tmp_path):
    """Ten times as many keys as there is room for, each seen once."""
    engine = TieredEngine(Engine.create(config(50), "cpu"), Room(tmp_path))
    rows = []
    for number in range(20):
        code = np.arange(number * 50, number * 50 + 50)
        report = engine.step(streams.batch_of(code, np.full(50, number + 1) * streams.SECOND, np.ones(50), offset=code))
        rows.append(len(engine._engine._table.series))
    assert report.series_total <= 50
    assert report.series_stored == 1000 - report.series_total
    assert rows[-1] == rows[2] <= 101


def alive(broker: Broker, tmp_path: Path, fate: Fate | None = None, most: int = 1) -> Process:
    """A life of the service with the real engine, and room for hardly a series."""
    setting = streams.small_config(training={"max_wait": 1}, series={"max_series": most}, model={"hidden_size": 3})
    process = Process(
        broker, tmp_path / "state", fate, pace=dataclasses.replace(PACE, trim=False, checkpoint_every_records=10)
    )
    room = Room(tmp_path / "state" / "scratch")
    maker = EngineMaker(
        lambda _: TieredEngine(Engine.create(setting, "cpu"), room),
        lambda state, _, __: TieredEngine.of(Engine.restore(setting, "cpu", state), room, state),
    )
    process.world = dataclasses.replace(process.world, maker=maker)
    return process


def inhabited() -> Broker:
    return Broker({"in": [[json.dumps({"key": f"s{i * i % 7}", "value": i * 7 % 31}).encode() for i in range(60)]]})


def test_killed_at_any_call_and_started_again_no_series_beyond_memory_is_lost(tmp_path):
    """Every 13th call: of the disk, the broker, the chain. Files are linked, written anew, and replayed over."""
    reference = inhabited()
    (tmp_path / "reference").mkdir()
    expected = alive(reference, tmp_path / "reference", most=1000).run().state().digests()
    published, linked, at = [m.value for m in reference.published], 0, 0
    for at in itertools.count(5, 13):
        broker, here = inhabited(), tmp_path / f"{at}"
        here.mkdir()
        try:
            alive(broker, here, Fate(at)).run()
            finished = True
        except Crash:
            finished = False
        again = alive(broker, here)
        engine = again.run()
        assert [m.value for m in broker.published] == published, at
        assert engine.state().digests() == expected, at
        linked += any(len(again.store.header(step).files_left) > 1 for step in again.store.steps())
        if finished:
            break
    assert at > 100
    assert linked
