"""The series table: rows by series in chunks, copied when a snapshot holds them."""

import numpy as np
import pytest
import torch

from streamlstm.records.batch import SeriesId
from streamlstm.series.table import CHUNK_ROWS, Column, SeriesTable

COLUMNS = [
    Column("age", (), torch.int64, host=True),
    Column("mean", (), torch.float64, 0.5),
    Column("carry", (3,), torch.float32),
    Column("ring", (5,), torch.int64, -7),
    Column("window", (5, 2), torch.float32),
]
MANY = 2 * CHUNK_ROWS + 37


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
    assert table.slot_of[name(CHUNK_ROWS + 1)] == CHUNK_ROWS + 1


def test_one_series_takes_the_room_of_one():
    """With a thousand horizons a row of the ledger is megabytes."""
    table = table_of(1)
    assert all(len(chunk) == 1 for chunks in table.freeze().values() for chunk in chunks)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, MANY])
def test_room_is_at_most_twice_what_is_used(count):
    chunks = table_of(count).freeze()["age"]
    assert count <= sum(len(chunk) for chunk in chunks) <= 2 * count
    assert all(len(chunk) == CHUNK_ROWS for chunk in chunks[:-1])


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
    slots = np.array([5, CHUNK_ROWS + 5, 5, 5])
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
    frozen = table.freeze()
    copies = {column: [chunk.clone() for chunk in chunks] for column, chunks in frozen.items()}
    everybody = table.select(np.arange(count))
    table.fill("age", everybody, 1)
    table.scatter("mean", everybody, torch.zeros(count, dtype=torch.float64))
    table.scatter_at("ring", everybody, torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
    table.scatter_at("window", everybody, torch.zeros(count, 1, dtype=torch.int64), torch.zeros(count, 1, 2))
    for i in range(count, count + 40):
        table.add(name(i))
    for column, chunks in frozen.items():
        assert all(torch.equal(chunk, copy) for chunk, copy in zip(chunks, copies[column], strict=True))
    assert whole(table, "age")[:count].eq(1).all()


def test_only_the_chunks_that_are_written_to_are_copied():
    table = filled(MANY)
    first = table.freeze()
    table.fill("age", table.select(np.array([CHUNK_ROWS + 1])), 5)
    second = table.freeze()
    shared = [a is b for a, b in zip(first["age"], second["age"], strict=True)]
    assert shared == [True, False, True]
    assert all(a is b for a, b in zip(first["window"], second["window"], strict=True))


def test_a_chunk_is_copied_once_for_each_snapshot():
    table = filled(3)
    table.freeze()
    everybody = table.select(np.arange(3))
    table.fill("age", everybody, 5)
    mine = table._chunks["age"][0]
    table.fill("age", everybody, 6)
    assert table._chunks["age"][0] is mine


@pytest.mark.parametrize("count", [0, 1, 7, CHUNK_ROWS, MANY])
def test_what_is_frozen_loads_as_it_was(count):
    table = filled(count)
    again = SeriesTable(COLUMNS, "cpu")
    again.load(table.series, table.freeze())
    assert again.series == table.series
    assert again.slot_of == table.slot_of
    assert all(torch.equal(whole(again, column.name), whole(table, column.name)) for column in COLUMNS)


def test_chunks_of_any_length_load():
    table = filled(50)
    cut = {column.name: list(whole(table, column.name).split([1, 30, 19])) for column in COLUMNS}
    again = SeriesTable(COLUMNS, "cpu")
    again.load(table.series, cut)
    assert all(torch.equal(whole(again, column.name), whole(table, column.name)) for column in COLUMNS)


def test_a_loaded_table_shares_nothing_with_what_it_was_loaded_from():
    table = filled(5)
    frozen = table.freeze()
    copy = frozen["carry"][0].clone()
    again = SeriesTable(COLUMNS, "cpu")
    again.load(table.series, frozen)
    again.fill("carry", again.select(np.arange(5)), 3)
    assert torch.equal(frozen["carry"][0], copy)


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
    columns = filled(4).freeze()
    spoil(columns)
    with pytest.raises(ValueError, match=named):
        SeriesTable(COLUMNS, "cpu").load([name(i) for i in range(4)], columns)


def test_those_above_a_bound_are_counted_over_all_chunks_and_no_further():
    table = table_of(MANY)
    table.scatter("age", table.select(np.arange(MANY)), torch.arange(MANY))
    assert table.count_above("age", -1) == MANY
    assert table.count_above("age", CHUNK_ROWS) == MANY - CHUNK_ROWS - 1
    assert table.count_above("age", MANY) == 0
