import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.engine.state import EngineState
from streamlstm.errors import CheckpointError
from streamlstm.records.batch import SeriesId
from streamlstm.recovery import snapshot
from streamlstm.recovery.snapshot import (
    describe_columns,
    file_name,
    group_by_place,
    join_series,
    parts_of,
    read_series,
    read_tensors,
    write_series,
    write_tensors,
)

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def any_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits at all: NaN with payloads, denormals, -0.0."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8).bool()
    n = int(torch.tensor(shape).prod()) * dtype.itemsize
    return torch.randint(0, 256, (n,), dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def store(state: EngineState) -> EngineState:
    columns = describe_columns(state)
    parts = []
    for place, rows in group_by_place(state.series).items():
        for part in parts_of(state, rows):
            file = io.BytesIO()
            write_series(file, state, place, part)
            parts.append(read_series(file.getvalue(), columns))
    series, joined = join_series(parts, columns)
    files = io.BytesIO(), io.BytesIO()
    write_tensors(files[0], state.weights)
    write_tensors(files[1], state.training)
    return EngineState(
        state.step,
        series,
        joined,
        read_tensors(files[0].getvalue()),
        read_tensors(files[1].getvalue()),
        state.meta,
    )


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=12, unique=True),
    partitions=st.integers(1, 3),
    chunk=st.integers(1, 7),
    spare=st.integers(0, 5),
    shape=st.lists(st.integers(0, 3), max_size=3),
    seed=st.integers(0, 1000),
)
def test_a_state_comes_back_bit_for_bit(keys, partitions, chunk, spare, shape, seed):
    torch.manual_seed(seed)
    series = tuple(SeriesId("a topic/ü", i % partitions, key) for i, key in enumerate(keys))
    capacity = len(keys) + spare or 1
    columns = {
        f"{dtype}{len(dims)}".removeprefix("torch."): list(torch.split(any_bits(dtype, capacity, *dims), chunk))
        for dtype in DTYPES
        for dims in ((), tuple(shape))
    }
    state = EngineState(3, series, columns, {"w": torch.randn(3, 2).t()}, {"q": torch.empty(0, 4)}, {"n": 1})

    back = store(state)

    assert set(back.series) == set(series)
    order = [series.index(ident) for ident in back.series]
    for name in columns:
        expected = state.column(name)[torch.tensor(order, dtype=torch.int64)]
        assert back.column(name).dtype == expected.dtype
        assert back.column(name).shape == expected.shape
        assert bits(back.column(name)) == bits(expected), name
    assert torch.equal(back.weights["w"], state.weights["w"])
    assert back.training["q"].shape == (0, 4)


def test_rows_are_sorted_by_key_and_numbers_can_be_read_by_other_tools():
    series = tuple(SeriesId("t", 0, key) for key in ("b", "c", "a"))
    state = EngineState(1, series, {"age": [torch.tensor([2, 3, 1])]}, {}, {}, {})
    file = io.BytesIO()
    ((place, rows),) = group_by_place(series).items()

    write_series(file, state, place, rows)

    assert pq.read_table(io.BytesIO(file.getvalue())).to_pydict() == {"key": ["a", "b", "c"], "age": [1, 2, 3]}


def test_many_row_groups_are_read_as_one():
    n = 20_000
    series = tuple(SeriesId("t", 0, f"{i:06d}") for i in range(n))
    values = torch.randn(n, 3)

    back = store(EngineState(1, series, {"v": list(torch.split(values, 4096))}, {}, {}, {}))

    assert torch.equal(back.column("v"), values)


@pytest.mark.parametrize(
    ("topic", "count", "columns"),
    [
        ("t", 1, {f"a-rather-long-name-of-a-column-{i}": (torch.int64,) for i in range(500)}),
        ("t", 8192, {f"small{i}": (torch.int8,) for i in range(40)}),
        ("t" * 100_000, 2, {"v": (torch.float32, 2)}),
        ("t", 3, {"wide": (torch.uint8, 5, 1 << 20), "empty": (torch.float32, 0)}),
    ],
)
def test_there_is_room_for_any_columns(topic, count, columns):
    series = tuple(SeriesId(topic, 0, f"{i:04d}") for i in range(count))
    values = {name: [any_bits(dtype, len(series), *dims)] for name, (dtype, *dims) in columns.items()}

    back = store(EngineState(1, series, values, {}, {}, {}))

    assert back.series == series
    for name, (value,) in values.items():
        assert bits(back.column(name)) == bits(value)


def test_a_column_that_was_not_announced_is_refused():
    series = (SeriesId("t", 0, "a"),)
    file = io.BytesIO()
    state = EngineState(1, series, {"age": [torch.tensor([2])]}, {}, {}, {})
    ((place, rows),) = group_by_place(series).items()
    write_series(file, state, place, rows)

    other = describe_columns(EngineState(1, series, {"age": [torch.tensor([2.0])]}, {}, {}, {}))
    with pytest.raises(CheckpointError, match=r"not those meta\.json lists"):
        read_series(file.getvalue(), other)


def test_a_pickle_is_never_run(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    file = io.BytesIO()
    torch.save({"w": Evil()}, file)

    with pytest.raises(CheckpointError, match="not a tensor file"):
        read_tensors(file.getvalue())
    assert not marker.exists()


def test_a_partition_is_as_many_files_as_its_bytes_ask_for(monkeypatch):
    monkeypatch.setattr(snapshot, "_FILE_BYTES", 100)
    state = EngineState(
        step=1,
        series=tuple(SeriesId("t", 0, f"s{i}") for i in range(25)),
        columns={"carry": [torch.zeros(25, 10)]},
        weights={},
        training={},
        meta={},
    )
    ((place, rows),) = group_by_place(state.series).items()
    parts = parts_of(state, rows)

    assert [len(part) for part in parts] == [2] * 12 + [1]
    assert sorted(np.concatenate(parts).tolist()) == list(range(25))
    assert [file_name("state", place, part=i) for i in range(2)] == ["state-t-0.parquet", "state-t-0.1.parquet"]
