"""The series table: rows by series in chunks, and snapshots of them."""

import threading

import numpy as np
import pytest
import torch

from streamlstm.records.batch import SeriesId
from streamlstm.series import table as series_table
from streamlstm.series.table import FIRST_ROWS, Column, SeriesTable

COLUMNS = [
    Column("age", (), torch.int64, host=True),
    Column("mean", (), torch.float64, 0.5),
    Column("carry", (3,), torch.float32),
    Column("ring", (5,), torch.int64, -7),
    Column("window", (5, 2), torch.float32),
]
MANY = 2 * FIRST_ROWS + 37


def name(i):
    return SeriesId("in", i % 3, f"s{i}")


def table_of(count):
    table = SeriesTable(COLUMNS, "cpu")
    for i in range(count):
        assert table.add(name(i)) == i
    return table


def filled(count, seed=0):
    """A table with noise in every column."""
    table, g = table_of(count), torch.Generator().manual_seed(seed)
    everybody = table.select(np.arange(count))
    for column in COLUMNS:
        noise = torch.randn((count, *column.shape), generator=g, dtype=torch.float64) * 100
        table.scatter(column.name, everybody, noise.to(column.dtype))
    return table


def whole(table, column):
    return table.gather(column, table.select(np.arange(len(table))))


def test_a_new_series_has_the_fill_values():
    table = table_of(3)
    assert whole(table, "mean").tolist() == [0.5, 0.5, 0.5]
    assert (whole(table, "ring") == -7).all()


def test_a_slot_stays_with_its_series_while_the_table_grows():
    table = SeriesTable(COLUMNS, "cpu")
    for i in range(MANY):
        slot = table.add(name(i))
        table.scatter("age", table.select(np.array([slot])), torch.tensor([i * 10]))
        table.scatter_at("ring", table.select(np.array([slot])), torch.tensor([i % 5]), torch.tensor([i]))
    assert whole(table, "age").tolist() == [i * 10 for i in range(MANY)]
    i = torch.arange(MANY)
    assert torch.equal(table.gather_at("ring", table.select(np.arange(MANY)), i % 5), i)
    assert table.slot_of[name(FIRST_ROWS + 1)] == FIRST_ROWS + 1


def room(table, column="age"):
    return [len(chunk) for chunk in table._chunks[column]]


def test_one_series_takes_the_room_of_one():
    """With a thousand horizons a row of the ledger is megabytes."""
    assert room(table_of(1), "window") == [1]


@pytest.mark.parametrize("count", [1, 2, 3, 1000, FIRST_ROWS - 1, FIRST_ROWS, FIRST_ROWS + 1, MANY, 9 * FIRST_ROWS])
def test_room_is_at_most_twice_what_is_used(count):
    chunks = room(table_of(count))
    assert count <= sum(chunks) <= 2 * count
    assert [FIRST_ROWS, *(FIRST_ROWS << i for i in range(10))][: len(chunks) - 1] == chunks[:-1]


def test_a_selection_over_several_chunks_reads_what_one_row_at_a_time_reads():
    table = filled(MANY)
    slots = np.random.default_rng(1).integers(0, MANY, 300)
    rows = table.select(slots)
    place = torch.from_numpy(np.random.default_rng(2).integers(0, 5, (300, 4)))
    for column in COLUMNS:
        single = torch.cat([table.gather(column.name, table.select(np.array([slot]))) for slot in slots.tolist()])
        assert torch.equal(table.gather(column.name, rows), single)
    for ring in ("ring", "window"):
        for places in (place, place[:, 0].contiguous()):
            single = torch.cat(
                [
                    table.gather_at(ring, table.select(np.array([slot])), places[i : i + 1])
                    for i, slot in enumerate(slots.tolist())
                ]
            )
            assert torch.equal(table.gather_at(ring, rows, places), single)


def test_a_selection_over_several_chunks_writes_what_one_row_at_a_time_writes():
    at_once, singly = filled(MANY), filled(MANY)
    slots = np.random.default_rng(3).permutation(MANY)[:300]
    g = torch.Generator().manual_seed(4)
    place = torch.from_numpy(np.stack([np.random.default_rng(i).permutation(5)[:2] for i in range(300)]))
    rows = at_once.select(slots)
    mean = torch.randn(300, generator=g, dtype=torch.float64)
    carry, window = torch.randn(300, 3, generator=g), torch.randn(300, 2, 2, generator=g)
    at_once.scatter("mean", rows, mean)
    at_once.scatter("carry", rows, carry)
    at_once.scatter_at("ring", rows, place[:, 0], torch.arange(300))
    at_once.scatter_at("window", rows, place, window)
    at_once.fill("age", rows, 99)
    for i, slot in enumerate(slots.tolist()):
        row = singly.select(np.array([slot]))
        singly.scatter("mean", row, mean[i : i + 1])
        singly.scatter("carry", row, carry[i : i + 1])
        singly.scatter_at("ring", row, place[i : i + 1, 0], torch.tensor([i]))
        singly.scatter_at("window", row, place[i : i + 1], window[i : i + 1])
        singly.fill("age", row, 99)
    for column in COLUMNS:
        assert torch.equal(whole(at_once, column.name), whole(singly, column.name))


def test_a_slot_may_be_read_many_times_in_one_selection():
    table = filled(MANY)
    slots = np.array([5, FIRST_ROWS + 5, 5, 5])
    carry = table.gather("carry", table.select(slots))
    assert torch.equal(carry[0], carry[2])
    assert torch.equal(carry[0], carry[3])
    assert not torch.equal(carry[0], carry[1])


def test_an_empty_selection_reads_nothing_and_writes_nothing():
    table = filled(3)
    before = whole(table, "carry")
    nobody = table.select(np.array([], np.int64))
    assert table.gather("carry", nobody).shape == (0, 3)
    assert table.gather_at("window", nobody, torch.empty(0, 4, dtype=torch.int64)).shape == (0, 4, 2)
    table.scatter("carry", nobody, torch.empty(0, 3))
    table.scatter_at("ring", nobody, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    table.fill("carry", nobody, 1)
    assert torch.equal(whole(table, "carry"), before)


def test_what_is_read_is_a_copy():
    table = filled(3)
    before = whole(table, "carry").clone()
    whole(table, "carry").zero_()
    assert torch.equal(whole(table, "carry"), before)


@pytest.mark.parametrize("count", [1, 7, MANY])
def test_a_snapshot_never_changes(count):
    table = filled(count)
    before = {column.name: whole(table, column.name).clone() for column in COLUMNS}
    _, taken = table.snapshot()
    everybody = table.select(np.arange(count))
    table.fill("age", everybody, 1)
    table.scatter("mean", everybody, torch.zeros(count, dtype=torch.float64))
    table.scatter_at("ring", everybody, torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
    table.scatter_at("window", everybody, torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count, 1, 2))
    for i in range(count, count + 40):
        table.add(name(i))
    assert all(torch.equal(taken[column][0], values) for column, values in before.items())
    assert whole(table, "age")[:count].eq(1).all()


def test_only_the_rows_that_are_written_to_are_put_aside_and_once():
    table = filled(MANY)
    _, taken = table.snapshot()
    for _ in range(3):
        table.fill("age", table.select(np.array([FIRST_ROWS + 1, 5, 5])), 5)
    assert np.flatnonzero(taken._aside_of >= 0).tolist() == [5, FIRST_ROWS + 1]


def test_rows_that_were_given_back_are_put_aside_no_more_and_their_room_is_used_again(monkeypatch):
    monkeypatch.setattr(series_table, "_ROWS_ASIDE", 8)
    table = filled(MANY)
    before = whole(table, "carry").clone()
    _, taken = table.snapshot()
    for first in range(0, MANY, 8):
        now, next_ones = np.arange(first, min(first + 8, MANY)), np.arange(first + 8, min(first + 16, MANY))
        some = table.select(np.concatenate([now, next_ones]))
        table.fill("carry", some, first)
        assert torch.equal(taken.take("carry", now), before[first : first + 8])
        taken.release(now)
        table.fill("carry", some, first + 1)
    assert taken.put_aside == 16
    with pytest.raises(AssertionError, match="given back"):
        taken.take("carry", np.array([3]))


def test_a_snapshot_that_nobody_holds_costs_nothing():
    table = filled(3)
    _, taken = table.snapshot()
    del taken
    table.fill("age", table.select(np.arange(3)), 5)
    assert table._snapshots == []


def test_a_snapshot_read_as_a_whole_costs_nothing_more():
    table = filled(3)
    _, taken = table.snapshot()
    everything = dict(taken)
    table.fill("age", table.select(np.arange(3)), 5)
    assert taken.put_aside == 0
    assert all(taken[column] is not None for column in everything)


@pytest.mark.parametrize("count", [0, 1, 7, FIRST_ROWS, MANY])
def test_what_a_snapshot_holds_loads_as_it_was(count):
    table = filled(count)
    again = SeriesTable(COLUMNS, "cpu")
    again.load(*table.snapshot())
    assert again.series == table.series
    assert again.slot_of == table.slot_of
    assert all(torch.equal(whole(again, column.name), whole(table, column.name)) for column in COLUMNS)


def test_pieces_of_any_length_load():
    table = filled(MANY)
    cut = {column.name: list(whole(table, column.name).split([1, 1030, 19, MANY - 1050])) for column in COLUMNS}
    again = SeriesTable(COLUMNS, "cpu")
    again.load([name(i) for i in range(MANY)], cut)
    assert all(torch.equal(whole(again, column.name), whole(table, column.name)) for column in COLUMNS)


def test_a_loaded_table_shares_nothing_with_what_it_was_loaded_from():
    table = filled(5)
    series, taken = table.snapshot()
    copy = taken["carry"][0].clone()
    again = SeriesTable(COLUMNS, "cpu")
    again.load(series, taken)
    again.fill("carry", again.select(np.arange(5)), 3)
    assert torch.equal(taken["carry"][0], copy)


def test_a_slot_that_became_free_is_blank_and_is_given_to_the_next_series():
    table = filled(5)
    table.remove(np.array([1, 3]))
    assert len(table) == 3
    assert name(3) not in table.slot_of
    assert sorted(table.add(name(i)) for i in (10, 11, 12)) == [1, 3, 5]
    again = table.select(np.array([1, 3]))
    for column in COLUMNS:
        assert table.gather(column.name, again).eq(column.fill).all()


def test_a_snapshot_of_a_table_with_free_slots_holds_the_others_only():
    table = filled(5)
    carry = whole(table, "carry")
    table.remove(np.array([1]))
    series, taken = table.snapshot()
    table.add(name(7))
    everybody = {one: taken.take("carry", np.array([i]))[0].tolist() for i, one in enumerate(series)}
    assert everybody == {name(i): carry[i].tolist() for i in (0, 2, 3, 4)}


@pytest.mark.parametrize("count", [1, 5, 1200])
def test_random_steps_between_random_reads_change_no_snapshot(count):
    """Many rounds of: write, grow, remove, take a snapshot, read some rows of one, drop one."""
    rng, torch_rng = np.random.default_rng(count), torch.Generator().manual_seed(count)
    table, held, added, reads = filled(count), [], count, 0
    for _ in range(400):
        slots = np.array(sorted(table.slot_of.values()))
        what = rng.integers(7)
        some = rng.choice(slots, rng.integers(0, min(len(slots), 40) + 1), replace=False)
        if what == 0 and len(held) < 4:
            series, taken = table.snapshot()
            order = [table.slot_of[one] for one in series]
            now = {c.name: table.gather(c.name, table.select(np.array(order))) for c in COLUMNS}
            held.append((taken, now, len(series), set()))
        elif what == 1 and held:
            taken, then, size, gone = held[rng.integers(len(held))]
            rows = np.array([row for row in rng.integers(0, size, rng.integers(1, 30)) if row not in gone], np.int64)
            for column, values in taken.take_all(then, rows).items():
                assert torch.equal(values, then[column][torch.from_numpy(rows)])
                reads += 1
            if len(held) % 2:
                taken.release(rows)
                gone.update(rows.tolist())
        elif what == 2 and held and rng.random() < 0.3:
            del held[rng.integers(len(held))]
        elif what == 3 and len(slots) > 2:
            table.remove(some[:3])
        elif what == 4:
            for _ in range(rng.integers(1, 60)):
                table.add(name(added))
                added += 1
        elif what == 5:
            table.scatter_at(
                "window",
                table.select(some),
                torch.from_numpy(rng.integers(0, 5, len(some))),
                torch.randn(len(some), 2, generator=torch_rng),
            )
        else:
            table.scatter("carry", table.select(some), torch.randn(len(some), 3, generator=torch_rng))
            table.fill("age", table.select(some), int(rng.integers(1000)))
    for taken, then, size, gone in held:
        rest = np.array([row for row in range(size) if row not in gone], np.int64)
        assert all(torch.equal(taken.take(column, rest), values[rest]) for column, values in then.items())
    assert reads > 100


def test_a_reader_beside_the_writer_never_meets_a_row_that_was_half_written():
    """For real, in two threads, over rows so wide that copies are interrupted."""
    wide = [Column("a", (512,), torch.int64), Column("b", (512,), torch.int64, host=True)]
    table, count = SeriesTable(wide, "cpu"), 3000
    for i in range(count):
        table.add(name(i))
    everybody = table.select(np.arange(count))
    stop, version = threading.Event(), 0
    torn: list[str] = []

    def read(taken, expected):
        rng = np.random.default_rng(expected)
        while not stop.is_set():
            for column in ("a", "b"):
                if not taken.take(column, rng.integers(0, count, 256)).eq(expected).all():
                    torn.append(column)
                    return

    for _ in range(6):
        for column in ("a", "b"):
            table.fill(column, everybody, version)
        _, taken = table.snapshot()
        stop.clear()
        reader = threading.Thread(target=read, args=(taken, version))
        reader.start()
        for i in range(30):
            version += 1
            some = table.select(np.arange(i * 100, i * 100 + 100))
            for column in ("a", "b"):
                table.scatter(column, some, torch.full((100, 512), version))
        stop.set()
        reader.join()
    assert torn == []


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda c: c.pop("ring"), "ring"),
        (lambda c: c.update(odd=c["age"]), "odd"),
        (lambda c: c.update(mean=[t.float() for t in c["mean"]]), "mean"),
        (lambda c: c.update(carry=[t[:, :2] for t in c["carry"]]), "carry"),
        (lambda c: c.update(window=[t[:2] for t in c["window"]]), "window"),
    ],
)
def test_columns_that_do_not_fit_are_refused_by_name(spoil, named):
    columns = dict(filled(4).snapshot()[1])
    spoil(columns)
    with pytest.raises(ValueError, match=named):
        SeriesTable(COLUMNS, "cpu").load([name(i) for i in range(4)], columns)


def test_those_above_a_bound_are_counted_over_all_chunks_and_no_further():
    table = table_of(MANY)
    table.scatter("age", table.select(np.arange(MANY)), torch.arange(MANY))
    assert table.count_above("age", -1) == MANY
    assert table.count_above("age", FIRST_ROWS) == MANY - FIRST_ROWS - 1
    assert table.count_above("age", MANY) == 0
