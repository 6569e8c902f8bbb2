import itertools
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.engine.report import EXPERTS, Forecasts, StepReport
from streamlstm.errors import StreamlstmError
from streamlstm.records.batch import Range, RecordBatch, SeriesId
from streamlstm.recovery.disk import Disk
from streamlstm.transport.forecasts import FORECAST_SCHEMA, ForecastWriter, SeriesNumbers

MINUTE = 60 * 10**9

# A record of these tests: (series, clock, age, target). Its forecast for horizon j is 1000 · offset + j.
Record = tuple[str, int, int, float]


def report(records: Sequence[Record], *, start: int = 0, horizons: int = 3, interval_ns: int = MINUTE) -> StepReport:
    count = len(records)
    keys = list(dict.fromkeys(series for series, _, _, _ in records))
    offset = np.arange(start, start + count)
    clock = np.array([clock for _, clock, _, _ in records], np.int64)
    batch = RecordBatch(
        cut=(Range("in", 3, start, start + count),),
        series=tuple(SeriesId("in", 3, key) for key in keys),
        code=np.array([keys.index(series) for series, _, _, _ in records], np.int32),
        range_index=np.zeros(count, np.int32),
        offset=offset,
        row=np.zeros(count, np.int32),
        time_ns=clock * MINUTE,
        broker_ns=np.full(count, -1, np.int64),
        target=np.array([target for _, _, _, target in records], np.float64),
    )
    forecasts = Forecasts(
        record_M=np.arange(count, dtype=np.int32),
        clock_M=clock,
        age_M=np.array([age for _, _, age, _ in records], np.int64),
        interval_ns_M=np.full(count, interval_ns, np.int64),
        update_M=np.zeros(count, np.int64),
        warming_M=np.zeros(count, np.bool_),
        yhat_MK=1000.0 * offset[:, None] + np.arange(1, horizons + 1),
        settled_error_MXK=np.full((count, len(EXPERTS), horizons), np.nan),
        settled_offset_MK=np.full((count, horizons), -1, np.int64),
    )
    return StepReport(1, batch, np.zeros(count, np.uint8), (), forecasts, (), {}, len(keys), 0)


def writing(path: Path, **limits: Any) -> ForecastWriter:
    return ForecastWriter(path, Disk(), SeriesNumbers(), **limits)


def written(path: Path, reports: Sequence[StepReport], **limits: int) -> list[dict[str, Any]]:
    with writing(path, **limits) as writer:
        for one in reports:
            writer.write(one)
    table = pq.read_table(path)
    assert table.schema == FORECAST_SCHEMA
    return table.to_pylist()


def truths(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int], float | None]:
    """(offset, horizon) → y"""
    return {(row["offset"], row["horizon"]): row["y"] for row in rows}


def test_each_horizon_of_each_forecast_is_a_row(tmp_path: Path) -> None:
    rows = written(tmp_path / "f.parquet", [report([("a", 0, 1, 5.0), ("a", 1, 2, 6.0)], start=40, horizons=2)])
    assert [{k: v for k, v in row.items() if k not in ("cutoff", "ds")} for row in rows] == [
        {
            "series_id": "a",
            "horizon": h,
            "yhat": 1000.0 * o + h,
            "y": y,
            "topic": "in",
            "partition": 3,
            "offset": o,
            "row": 0,
        }
        for o, h, y in ((40, 1, 6.0), (40, 2, None), (41, 1, None), (41, 2, None))
    ]
    assert rows[1]["ds"] - rows[1]["cutoff"] == timedelta(minutes=2)
    assert rows[0]["cutoff"].isoformat() == "1970-01-01T00:00:00+00:00"


def test_the_truth_is_matched_by_the_series_clock_and_not_by_counting_records(tmp_path: Path) -> None:
    rows = written(
        tmp_path / "f.parquet", [report([("a", 0, 1, 1.0), ("b", 0, 1, 9.0), ("a", 2, 2, 3.0), ("a", 3, 3, 4.0)])]
    )
    y = truths(rows)
    assert [y[0, h] for h in (1, 2, 3)] == [None, 3.0, 4.0]
    assert [y[1, h] for h in (1, 2, 3)] == [None, None, None]
    assert [y[2, h] for h in (1, 2, 3)] == [4.0, None, None]


def test_a_truth_that_is_missing_is_null(tmp_path: Path) -> None:
    y = truths(written(tmp_path / "f.parquet", [report([("a", 0, 1, 1.0), ("a", 1, 2, math.nan), ("a", 2, 3, 3.0)])]))
    assert [y[0, h] for h in (1, 2, 3)] == [None, 3.0, None]


def test_a_reset_ends_what_was_forecast_before_it(tmp_path: Path) -> None:
    y = truths(
        written(
            tmp_path / "f.parquet", [report([("a", 0, 1, 1.0), ("a", 1, 2, 2.0), ("a", 2, 1, 3.0), ("a", 3, 2, 4.0)])]
        )
    )
    assert [y[0, h] for h in (1, 2, 3)] == [2.0, None, None]
    assert [y[1, h] for h in (1, 2, 3)] == [None, None, None]
    assert y[2, 1] == 4.0


def test_no_interval_means_no_ds(tmp_path: Path) -> None:
    rows = written(tmp_path / "f.parquet", [report([("a", 0, 1, 1.0), ("a", 1, 2, 2.0)], interval_ns=0)])
    assert {row["ds"] for row in rows} == {None}
    assert truths(rows)[0, 1] == 2.0


def test_an_interval_beyond_all_times_means_no_ds(tmp_path: Path) -> None:
    with writing(tmp_path / "f.parquet") as writer:
        writer.write(report([("a", 0, 1, 1.0)], interval_ns=1 << 61))
    ds = pq.read_table(tmp_path / "f.parquet")["ds"]
    assert ds.is_null().to_pylist() == [False, False, True]


def test_a_forecast_that_is_not_a_number_is_null(tmp_path: Path) -> None:
    one = report([("a", 0, 1, math.nan)])
    one.forecasts.yhat_MK[:] = np.nan
    assert {row["yhat"] for row in written(tmp_path / "f.parquet", [one])} == {None}


def expected(records: Sequence[Record], horizons: int) -> dict[tuple[int, int], float | None]:
    """The truth by a loop over all pairs."""
    y: dict[tuple[int, int], float | None] = {}
    for i, (series, clock, _, _) in enumerate(records):
        for h in range(1, horizons + 1):
            y[i, h] = None
            for other, then, age, target in records[i + 1 :]:
                if other != series:
                    continue
                if age == 1:
                    break
                if then == clock + h and not math.isnan(target):
                    y[i, h] = target
    return y


@st.composite
def streams(draw: st.DrawFn) -> list[Record]:
    steps = draw(
        st.lists(
            st.tuples(st.sampled_from("abc"), st.sampled_from([1, 1, 1, 2, 5, 30]), st.integers(0, 9)), max_size=40
        )
    )
    clock, age = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
    records: list[Record] = []
    for i, (series, gap, luck) in enumerate(steps):
        clock[series] += gap
        age[series] = 1 if luck == 0 else age[series] + 1
        records.append((series, clock[series], age[series], math.nan if luck == 1 else float(i)))
    return records


@settings(max_examples=150, deadline=None)
@given(streams(), st.integers(1, 5), st.integers(1, 9), st.integers(1, 60))
def test_every_truth_that_came_is_found_however_the_stream_is_divided(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], horizons: int, size: int, at_once: int
) -> None:
    reports = [
        report(records[start : start + size], start=start, horizons=horizons) for start in range(0, len(records), size)
    ]
    path = tmp_path_factory.mktemp("any") / "f.parquet"
    rows = written(path, reports, rows_at_once=at_once)
    assert len(rows) == len(records) * horizons
    assert truths(rows) == expected(records, horizons)
    assert all(row["yhat"] == 1000.0 * row["offset"] + row["horizon"] for row in rows)
    assert all(row["series_id"] == records[row["offset"]][0] for row in rows)


def test_too_many_that_wait_are_written_oldest_first_with_what_has_come(tmp_path: Path) -> None:
    size, horizons = 1 << 10, 300
    fleet = [(f"s{i}", 0, 1, 1.0) for i in range(size)]
    path = tmp_path / "f.parquet"
    with writing(path, most_open=size * horizons // 2) as writer:
        writer.write(report(fleet, horizons=horizons))
        writer.write(report([(s, 1, 2, 2.0) for s, _, _, _ in fleet], start=size, horizons=horizons))
        writer.write(report([(s, 2, 3, 3.0) for s, _, _, _ in fleet], start=2 * size, horizons=horizons))
    assert writer.cut_short > 0
    table = pq.read_table(path, columns=["offset", "horizon", "y"])
    assert table.num_rows == 3 * size * horizons
    first = table.filter(pa.compute.field("horizon") == 1).sort_by("offset")["y"].to_pylist()
    assert first[size : 2 * size].count(3.0) >= size // 2


def test_what_is_left_at_the_end_is_written_in_the_order_of_the_log(tmp_path: Path) -> None:
    with writing(tmp_path / "f.parquet", rows_at_once=4) as writer:
        for n in range(6):
            writer.write(report([(s, n, n + 1, 1.0) for s in "abc"], start=3 * n))
        left = sorted(int(offset) for part in writer._waiting for offset in part.offset_F)
    offsets = pq.read_table(tmp_path / "f.parquet", columns=["offset"])["offset"].to_pylist()
    assert offsets[-3 * len(left) :] == [offset for offset in left for _ in range(3)]
    assert len(left) > 3


def test_memory_is_bounded_by_what_waits_and_not_by_the_stream(tmp_path: Path) -> None:
    horizons, rounds = 24, 3000
    with writing(tmp_path / "f.parquet") as writer:
        held = 0
        for n in range(rounds):
            writer.write(report([(s, n, n + 1, 1.0) for s in "abcdefgh"], start=8 * n, horizons=horizons))
            held = max(held, sum(len(part) for part in writer._waiting))
        assert writer.cut_short == 0
    assert held * horizons < 1.2 * (1 << 18)
    y = pq.read_table(tmp_path / "f.parquet", columns=["y"])["y"]
    assert y.null_count == 8 * sum(range(1, horizons + 1))


def test_the_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "f.parquet"
    path.write_text("an older one")
    writer = writing(path)
    writer.write(report([("a", 0, 1, 1.0)]))
    assert path.read_text() == "an older one"
    writer.finish()
    assert pq.read_table(path).num_rows == 3
    assert [p.name for p in tmp_path.iterdir()] == ["f.parquet"]


def test_a_replay_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def replay() -> None:
        with writing(tmp_path / "f.parquet") as writer:
            writer.write(report([("a", 0, 1, 1.0)]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replay()
    assert list(tmp_path.iterdir()) == []


def test_no_forecast_at_all_is_an_empty_table(tmp_path: Path) -> None:
    assert written(tmp_path / "f.parquet", [report([])]) == []


def test_a_directory_that_is_not_there_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StreamlstmError, match=r"cannot write .*f\.parquet: No such file"):
        writing(tmp_path / "gone" / "f.parquet")


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / ".f.parquet.rows").symlink_to("/dev/full")
    rng = np.random.default_rng(17)

    def replay() -> None:
        with writing(tmp_path / "f.parquet") as writer:
            for n in itertools.count():
                writer.write(report([("a", n, n + 1, rng.normal())], start=n, horizons=1000))

    with pytest.raises(StreamlstmError, match=r"cannot write .*f\.parquet: No space left on device"):
        replay()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_at_the_end_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / ".f.parquet.partial").symlink_to("/dev/full")
    writer = writing(tmp_path / "f.parquet")
    writer.write(report([("a", 0, 1, 1.0)]))
    with pytest.raises(StreamlstmError, match="No space left on device"):
        writer.finish()
    assert list(tmp_path.iterdir()) == []
