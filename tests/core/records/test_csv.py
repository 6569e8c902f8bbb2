import math
from typing import Any

import numpy as np
import pytest
from cuts import decoder, keys_of, messages, reasons
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamlstm.records.batch import RecordBatch
from streamlstm.records.csv import ends_quoted, split

S = 10**9
LONG = ["id", "t", "y"]


def csv(columns: list[str] = LONG, **keys: Any) -> Any:
    return decoder(columns, format="csv", **keys)


def test_a_row_becomes_a_record() -> None:
    batch = csv().decode(messages(b"a,5,1.5", b' b , "6" ,-2e3'))
    assert keys_of(batch) == ["a", "b"]
    assert batch.time_ns.tolist() == [5 * S, 6 * S]
    assert batch.target.tolist() == [1.5, -2000.0]


def test_nixtlas_long_layout_is_read_as_it_is() -> None:
    d = csv(["unique_id", "ds", "y"], series_id=["$.unique_id"], timestamp={"path": "$.ds"})
    batch = d.decode(messages(b"H1,2016-07-01 00:00:00,605.0", b"H1,2016-07-01 01:00:00,586.0", b"H2,2016-07-01,1"))
    assert keys_of(batch) == ["H1", "H1", "H2"]
    assert batch.time_ns.tolist() == [1_467_331_200 * S, 1_467_334_800 * S, 1_467_331_200 * S]
    assert d.naive_times


def test_a_wide_file_is_one_series_a_column() -> None:
    d = csv(["date", "HUFL", "OT"], series_id=["@field"], timestamp={"path": "$.date"}, target="$.*")
    batch = d.decode(messages(b"2016-07-01 00:00:00,1.5,2", b"2016-07-01 01:00:00,3,4"))
    assert keys_of(batch) == ["HUFL", "OT", "HUFL", "OT"]
    assert batch.row.tolist() == [0, 1, 0, 1]
    assert batch.target.tolist() == [1.5, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("cell", ["", "  ", "NaN", "nan", "NULL", "null", '""'])
def test_an_empty_cell_is_a_missing_value(cell: str) -> None:
    for keys in ({}, {"target": "$.*"}, {"csv": {"delimiter": ",", "decimal": "_"}}):
        batch = csv(**keys).decode(messages(b"a,1," + cell.encode(), b"a,2,7"))
        assert batch.rejected == ()
        assert math.isnan(batch.target[0])
        assert batch.target[1] == 7.0


def test_in_a_wide_file_text_is_rejected_and_its_neighbours_stay() -> None:
    d = csv(["t", "a", "label", "b"], series_id=["@field"], target="$.*")
    batch = d.decode(messages(b"1,5,high,6", b"2,7,,8", b"3,low,high,9"))
    assert keys_of(batch) == ["a", "b", "a", "label", "b", "b"]
    assert batch.row.tolist() == [0, 2, 0, 1, 2, 2]
    assert reasons(batch) == [(0, 1, "schema", "$.label"), (2, 0, "schema", "$.a"), (2, 1, "schema", "$.label")]


def test_every_cell_of_a_wide_row_without_any_number_is_rejected() -> None:
    batch = csv(["t", "a", "b"], series_id=["@field"], target="$.*").decode(messages(b"1,x,y", b"2,1,y"))
    assert reasons(batch) == [(0, 0, "schema", "$.a"), (0, 1, "schema", "$.b"), (1, 1, "schema", "$.b")]
    assert keys_of(batch) == ["a"]


def test_a_wide_files_infinite_cell_is_rejected_and_its_neighbours_stay() -> None:
    batch = csv(["t", "a", "b", "c"], series_id=["@field"], target="$.*").decode(
        messages(b"1,2,inf,1e39", b"2,,3,-Inf")
    )
    assert keys_of(batch) == ["a", "a", "b"]
    assert reasons(batch) == [(0, 1, "non_finite", "$.b"), (0, 2, "non_finite", "$.c"), (1, 2, "non_finite", "$.c")]


def test_a_number_with_the_other_decimal_mark_is_not_taken_for_text() -> None:
    d = csv(["t", "a", "b"], series_id=["@field"], target="$.*", csv={"delimiter": ";", "decimal": "."})
    batch = d.decode(messages(b"1;2,5;3"))
    assert reasons(batch) == [(0, 0, "schema", "$.a")]
    assert "decimal" in batch.rejected[0].message


def test_decimal_commas() -> None:
    d = csv(csv={"delimiter": ";", "decimal": ","})
    batch = d.decode(messages(b"a;1;2,5", b"a;2;-3", b"a;3;1.234,5", b"a;4;,5"))
    assert batch.target.tolist() == [2.5, -3.0, 0.5]
    assert reasons(batch) == [(2, 0, "schema", "$.y")]


def test_a_column_without_a_name_is_none() -> None:
    d = csv(["t", "a", "", ""], series_id=["@field"], target="$.*")
    assert keys_of(d.decode(messages(b"1,2,,"))) == ["a"]


def test_column_names_may_be_odd() -> None:
    d = csv(["Date", "PT08.S1(CO)", "odd key"], series_id=["@field"], timestamp={"path": "$.Date", "unit": "s"},
            target={"co": "$.PT08.S1(CO)", "odd": "$['odd key']"})  # fmt: skip
    assert keys_of(d.decode(messages(b"1,2,3"))) == ["co", "odd"]


@pytest.mark.parametrize(
    ("value", "reason", "path"),
    [
        (None, "decode", ""),
        (b"a,1", "schema", ""),
        (b"a,1,2,3", "schema", ""),
        (b"", "schema", ""),
        (b"\xff,1,2", "decode", ""),
        (b'a,1,"2', "decode", ""),
        (b"a\n,1,2", "decode", ""),
        (b"a," + b"1" * 2000 + b",2", "oversize", ""),
        (b",1,2", "mapping", "$.id"),
        (b"a,soon,2", "schema", "$.t"),
        (b"a,1,high", "schema", "$.y"),
        (b"a,1,1_000", "schema", "$.y"),
        (b"a,1,inf", "non_finite", "$.y"),
        (b"a,1,1e39", "non_finite", "$.y"),
    ],
)
def test_a_bad_row_is_rejected_for_its_reason(value: bytes | None, reason: str, path: str) -> None:
    batch = csv(max_bytes=1000).decode(messages(b"a,1,2", value, b"a,2,3"))
    assert reasons(batch) == [(1, 0, reason, path)]
    assert batch.offset.tolist() == [0, 2]


def test_a_row_without_a_time_has_no_broker_to_ask() -> None:
    assert reasons(csv().decode(messages(b"a,,2", broker_ns=-1))) == [(0, 0, "mapping", "$.t")]


def test_a_quoted_cell_holds_delimiters_quotes_and_line_ends() -> None:
    batch = csv().decode(messages(b'"a,""b""\nc",1,"2.5"'))
    assert keys_of(batch) == ['a,"b"\nc']
    assert batch.target.tolist() == [2.5]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " ", "§"])
@given(
    cells=st.lists(
        st.text(st.characters(exclude_characters='\r\n"', codec="utf-8"), max_size=5), min_size=1, max_size=4
    )
)
def test_rows_without_quotes_split_as_those_with(delimiter: str, cells: list[str]) -> None:
    row = delimiter.join(cells).encode()
    assert split(row, delimiter) == split(row + f'{delimiter}"x"'.encode(), delimiter)[:-1]


@settings(deadline=None)
@given(st.binary(max_size=12), st.binary(max_size=12), st.sampled_from([b",", b";", b" "]))
@example(b'"', b"", b",")
@example(b'a,"b', b'c"', b",")
def test_whether_a_line_ends_in_quotes_does_not_depend_on_where_it_is_cut(a: bytes, b: bytes, delimiter: bytes) -> None:
    quoted = ends_quoted(a, delimiter)
    if quoted and not a.endswith(b'"') and not b.startswith(b'"'):
        assert ends_quoted(a + b, delimiter) == ends_quoted(b, delimiter, quoted=True)


columns = ["id", "t", "y", "z"]
decoders = [
    csv(columns),
    csv(columns, target="$.*", timestamp={"path": "$.t"}),
    csv(columns, target={"a": "$.y", "b": "$.z"}, csv={"delimiter": ";", "decimal": ","}),
]
cell = st.one_of(
    st.text(max_size=4), st.floats().map(str), st.sampled_from(["", "1", "1,5", '"', '"a', "nan", "null", "1e400"])
)
row = st.one_of(
    st.none(),
    st.binary(max_size=20),
    st.lists(cell, min_size=4, max_size=4).map(lambda c: ",".join(c).encode()),
    st.lists(cell, min_size=4, max_size=4).map(lambda c: ";".join(c).encode()),
)


def facts(batch: RecordBatch) -> tuple[list[Any], list[Any]]:
    columns = [batch.offset, batch.row, batch.time_ns, np.nan_to_num(batch.target, nan=1e99)]
    return list(zip(keys_of(batch), *(c.tolist() for c in columns), strict=True)), list(batch.rejected)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(decoders), st.lists(row, min_size=1, max_size=5))
def test_what_a_row_becomes_depends_on_it_alone(d: Any, values: list[bytes | None]) -> None:
    together = facts(d.decode(messages(*values)))
    apart = [facts(d.decode(messages(value, start=i))) for i, value in enumerate(values)]
    assert together == ([x for good, _ in apart for x in good], [x for _, bad in apart for x in bad])
    assert all(good or bad for good, bad in apart)
