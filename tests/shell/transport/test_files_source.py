from pathlib import Path
from typing import Any

import pytest
from cuts import decode_section, keys_of
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlstm.errors import ConfigError, DataError, LogGap
from streamlstm.records.batch import Range
from streamlstm.records.decode import compile_decoder
from streamlstm.transport.files import FileSource
from streamlstm.transport.interfaces import Position

CSV = decode_section(format="csv", max_bytes=200)
JSON = decode_section(max_bytes=200)
SHARED = Path(__file__).parents[3] / "../shared/data"


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def source(*paths: Path, decode: Any = CSV) -> FileSource:
    return FileSource(paths, topic="history", decode=decode)


def rows(files: FileSource, at_once: int = 1000) -> list[bytes | None]:
    values: list[bytes | None] = []
    while (messages := files.poll(at_once, 0.0)) is not None:
        values += messages.value
    return values


def test_rows_are_messages_of_one_partition(tmp_path: Path) -> None:
    files = source(write(tmp_path / "a.csv", "id,t,y\na,1,2\nb,2,3\nc,3,4\n"))
    assert files.columns == ("id", "t", "y")
    first, second = files.poll(2, 0.0), files.poll(2, 0.0)
    assert first is not None
    assert second is not None
    assert first.cut == (Range("history", 0, 0, 2),)
    assert first.value == [b"a,1,2", b"b,2,3"]
    assert first.offset.tolist() == [0, 1]
    assert first.broker_ns.tolist() == [-1, -1]
    assert first.key == [None, None]
    assert second.cut == (Range("history", 0, 2, 3),)
    assert files.poll(2, 0.0) is None
    assert files.exhausted


def test_files_follow_each_other_and_offsets_go_on(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.csv", "id,t,y\na,1,2"), write(tmp_path / "b.csv", "id,t,y\nb,2,3\n")
    messages = source(a, b).poll(10, 0.0)
    assert messages is not None
    assert messages.value == [b"a,1,2", b"b,2,3"]
    assert messages.offset.tolist() == [0, 1]


def test_a_bom_crlf_blank_lines_and_a_missing_last_line_end_do_not_count(tmp_path: Path) -> None:
    plain = source(write(tmp_path / "a.csv", "id,t,y\na,1,2\nb,2,3\n"))
    odd = source(write(tmp_path / "b.csv", b"\xef\xbb\xbfid,t,y\r\n\r\na,1,2\r\n  \r\nb,2,3"))
    assert odd.columns == plain.columns
    assert rows(odd) == rows(plain)
    assert odd.content_digest() == plain.content_digest()


def test_ndjson_is_a_message_a_line(tmp_path: Path) -> None:
    files = source(write(tmp_path / "a.jsonl", '\ufeff{"id":"a"}\n\n{"id":"\\"b"}\r\n"'), decode=JSON)
    assert files.columns is None
    assert rows(files) == [b'{"id":"a"}', b'{"id":"\\"b"}', b'"']


def test_a_quoted_cell_may_hold_line_ends(tmp_path: Path) -> None:
    content = 'id,t,y\n"a\r\n""x"", b",1,2\n5" pipe,2,3\n"c","2\n","\n"\n'
    assert rows(source(write(tmp_path / "a.csv", content))) == [
        b'"a\r\n""x"", b",1,2',
        b'5" pipe,2,3',
        b'"c","2\n","\n"',
    ]


def test_a_quote_that_is_never_closed_costs_one_row(tmp_path: Path) -> None:
    good = [f"a,{i},2" for i in range(100)]
    files = source(write(tmp_path / "a.csv", "\n".join(["id,t,y", *good[:3], '"a,3,2', *good[4:]])))
    values = rows(files, 7)
    assert values == [line.encode() for line in [*good[:3], '"a,3,2', *good[4:]]]
    batch = compile_decoder(CSV, files.columns).decode(_whole(tmp_path / "a.csv"))
    assert len(batch) == 99
    assert [(r.offset, r.reason) for r in batch.rejected] == [(3, "decode")]


def test_a_row_that_is_too_long_is_cut_so_that_it_is_rejected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,t,y\na,1,2\na,2," + "9" * 5000 + "\na,3,4\n" + "a" * 5000)
    values = rows(source(path))
    assert [len(value or b"") for value in values] == [5, 204, 5, 204]
    batch = compile_decoder(CSV, ("id", "t", "y")).decode(_whole(path))
    assert [(r.offset, r.reason) for r in batch.rejected] == [(1, "oversize"), (3, "oversize")]
    assert batch.target.tolist() == [2.0, 4.0]


def _whole(path: Path) -> Any:
    messages = source(path).poll(100_000, 0.0)
    assert messages is not None
    return messages


def test_a_header_may_be_quoted_and_spaced(tmp_path: Path) -> None:
    assert source(write(tmp_path / "a.csv", '"id", "odd\nname" ,y\n')).columns == ("id", "odd\nname", "y")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"\xff\xfei\x00d\x00", "UTF-8"),
        (b"id,y,y\n", "names y twice"),
        (b'id,"y\n', "not CSV"),
    ],
)
def test_a_header_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why):
        source(write(tmp_path / "a.csv", content))


def test_headers_must_agree(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.csv", "id,t,y\n"), write(tmp_path / "b.csv", "id,y,t\n")
    with pytest.raises(DataError, match=r"b\.csv has the columns"):
        source(a, b)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.csv: No such file"):
        source(tmp_path / "gone.csv")
    with pytest.raises(DataError, match="Is a directory"):
        source(tmp_path)
    with pytest.raises(DataError, match="no file"):
        source()


def test_a_file_that_goes_away_is_a_data_error(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.csv", "id,t,y\na,1,2\n"), write(tmp_path / "b.csv", "id,t,y\nb,2,3\n")
    files = source(a, b)
    b.unlink()
    with pytest.raises(DataError, match=r"b\.csv"):
        files.poll(10, 0.0)


def test_seeking_goes_on_from_there_with_the_same_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,t,y\n" + "".join(f"a,{i},2\n" for i in range(50)))
    straight = source(path)
    straight.poll(30, 0.0)
    sought = source(path)
    sought.seek([Position("history", 0, 30)])
    assert sought.content_digest() == straight.content_digest()
    after = sought.poll(1, 0.0)
    assert after is not None
    assert (after.value, after.offset.tolist()) == ([b"a,30,2"], [30])
    sought.seek([Position("history", 0, 30)])
    assert sought.content_digest() == straight.content_digest()


def test_the_digest_is_of_the_rows_read_and_the_header(tmp_path: Path) -> None:
    content = "id,t,y\n" + "".join(f"a,{i},2\n" for i in range(20))
    whole = source(write(tmp_path / "a.csv", content))
    rows(whole, 20)
    halves = source(write(tmp_path / "b.csv", content))
    rows(halves, 3)
    assert whole.content_digest() == halves.content_digest()
    other_row = source(write(tmp_path / "c.csv", content.replace("a,7,2", "a,7,3")))
    other_name = source(write(tmp_path / "d.csv", content.replace("id", "ID")))
    rows(other_row)
    rows(other_name)
    assert len({whole.content_digest(), other_row.content_digest(), other_name.content_digest()}) == 3


def test_a_recorded_cut_is_read_exactly(tmp_path: Path) -> None:
    files = source(write(tmp_path / "a.csv", "id,t,y\n" + "".join(f"a,{i},2\n" for i in range(10))))
    cut = (Range("history", 0, 4, 6), Range("history", 0, 1, 2))
    messages = files.read(cut, 0.0)
    assert messages.cut == cut
    assert messages.offset.tolist() == [4, 5, 1]
    assert messages.range_index.tolist() == [0, 0, 1]
    assert messages.value == [b"a,4,2", b"a,5,2", b"a,1,2"]


def test_rows_that_the_files_have_not_got_are_a_gap(tmp_path: Path) -> None:
    files = source(write(tmp_path / "a.csv", "id,t,y\na,1,2\n"))
    with pytest.raises(LogGap, match="ends at row 3"):
        files.read((Range("history", 0, 0, 3),), 0.0)
    with pytest.raises(LogGap, match="row 5"):
        files.seek([Position("history", 0, 5)])
    with pytest.raises(DataError, match="other"):
        files.seek([Position("other", 0, 0)])
    with pytest.raises(DataError, match="other"):
        files.read((Range("other", 0, 0, 1),), 0.0)


def test_progress_ends_at_the_files_size(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,t,y\n" + "".join(f"a,{i},2\n" for i in range(10)) + "\n\n")
    files = source(path, path)
    assert files.bytes_total == 2 * path.stat().st_size
    seen = [files.bytes_read]
    while files.poll(4, 0.0):
        seen.append(files.bytes_read)
    assert seen == sorted(seen)
    assert files.bytes_read == files.bytes_total


def test_closing_twice_is_no_error(tmp_path: Path) -> None:
    files = source(write(tmp_path / "a.csv", "id,t,y\na,1,2\n"))
    files.poll(1, 0.0)
    files.close()
    files.close()


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from('a,"\n\r é'), max_size=60),
    st.integers(1, 5),
)
def test_any_file_is_read_whole_whatever_the_size_of_the_polls(
    tmp_path_factory: pytest.TempPathFactory, content: str, at_once: int
) -> None:
    path = write(tmp_path_factory.mktemp("any") / "a.csv", "id,t,y\n" + content)
    whole, by_parts = source(path), source(path)
    assert rows(whole) == rows(by_parts, at_once)
    assert whole.content_digest() == by_parts.content_digest()
    kept = b"".join(value or b"" for value in rows(source(path)))
    blank = bytes.maketrans(b"", b"")
    assert kept.translate(blank, b"\r\n ") == content.encode().translate(blank, b"\r\n ")


@pytest.mark.parametrize(
    ("name", "unit", "count", "series"),
    [("ETTh2.csv", "auto", 17420, 7), ("WTH.csv", "%m/%d/%Y %H:%M", 35064, 12)],
)
def test_the_benchmark_files_decode_without_a_rejection(name: str, unit: str, count: int, series: int) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    section = decode_section(
        format="csv", series_id=["@field"], timestamp={"path": "$.date", "unit": unit}, target="$.*"
    )
    files = source(path, decode=section)
    decoder = compile_decoder(section, files.columns)
    records, names, times = 0, set[str](), set[int]()
    while (messages := files.poll(2000, 0.0)) is not None:
        batch = decoder.decode(messages)
        assert batch.rejected == ()
        records += len(batch)
        names |= set(keys_of(batch))
        times |= set(batch.time_ns.tolist())
    assert (records, len(names)) == (count * series, series)
    assert max(times) - min(times) == (count - 1) * 3600 * 10**9


def test_a_column_that_is_not_in_the_file_is_a_configuration_error(tmp_path: Path) -> None:
    files = source(write(tmp_path / "a.csv", "id,t,y\na,1,2\n"))
    with pytest.raises(ConfigError, match="the header has id, t, y"):
        compile_decoder(decode_section(format="csv", target="$.value"), files.columns)
