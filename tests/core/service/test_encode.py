import hashlib
import json
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import SECOND_NS, START_NS, make_messages, make_report

from streamlstm.engine.report import Outcome, StepReport
from streamlstm.records.batch import Messages, Range, Rejected
from streamlstm.service.encode import ForecastEncoder, format_times
from streamlstm.transport.interfaces import OutMessage

HASH = "0123456789abcdef"
LAST_NS = 2**63 - 1


def naive_time(ns: int) -> str | None:
    """RFC 3339 by datetime, decimals by hand; None past the year 9999."""
    try:
        whole = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=ns // SECOND_NS)
    except OverflowError:
        return None
    decimals = f"{ns % SECOND_NS:09d}".rstrip("0")
    return f"{whole:%Y-%m-%dT%H:%M:%S}".rjust(19, "0") + (f".{decimals}" if decimals else "") + "Z"


def none_if_nan(x: float) -> float | None:
    return None if math.isnan(x) else x


def naive_forecasts(report: StepReport) -> list[dict]:
    """What interface.md shows, one record and one horizon at a time."""
    batch, out = report.batch, report.forecasts
    values = []
    for i, k in enumerate(out.record_M.tolist()):
        time_ns, interval_ns = int(batch.time_ns[k]), int(out.interval_ns_M[i])
        where = batch.cut[batch.range_index[k]]
        horizons = range(1, out.yhat_MK.shape[1] + 1)
        due = [naive_time(time_ns + j * interval_ns) for j in horizons]
        if interval_ns == 0 or None in due:
            due = [None] * len(due)
        values.append(
            {
                "schema": 1,
                "series_id": batch.series[batch.code[k]].key,
                "cutoff": naive_time(time_ns),
                "y": none_if_nan(float(batch.target[k])),
                "status": "warming" if out.warming_M[i] else "ready",
                "forecasts": [
                    {"horizon": j, "ds": due[j - 1], "yhat": none_if_nan(float(out.yhat_MK[i, j - 1]))}
                    for j in horizons
                ],
                "model": {"version": "0.1.0", "config": HASH[:8], "revision": 0, "update": int(out.update_M[i])},
                "source": {
                    "topic": where.topic,
                    "partition": where.partition,
                    "offset": int(batch.offset[k]),
                    "row": int(batch.row[k]),
                },
            }
        )
    return values


def encode(report: StepReport) -> list[OutMessage]:
    return ForecastEncoder(HASH, report.forecasts.yhat_MK.shape[1], version="0.1.0").encode_forecasts(report)


def encode_dead_letters(report: StepReport, messages: Messages) -> list[OutMessage]:
    return ForecastEncoder(HASH, 3, version="0.1.0").encode_dead_letters(report, messages)


floats = st.floats(allow_infinity=False, allow_nan=True)
texts = st.text(max_size=20)


@st.composite
def reports(draw: st.DrawFn) -> StepReport:
    records = draw(st.integers(0, 6))
    horizons = draw(st.integers(1, 5))
    spacing = st.sampled_from([0, 1, SECOND_NS, 86_400 * SECOND_NS, LAST_NS]) | st.integers(0, LAST_NS)
    times = st.integers(-(2**63), LAST_NS)

    def listed(one: st.SearchStrategy, n: int) -> list:
        return draw(st.lists(one, min_size=n, max_size=n))

    outcomes = listed(st.sampled_from(list(Outcome)), records)
    m = sum(o <= Outcome.WARMING for o in outcomes)
    return make_report(
        keys=draw(st.lists(texts, min_size=1, max_size=3, unique=True)),
        topic=draw(st.text('ab.%"\\é', min_size=1, max_size=5)),
        records=records,
        horizons=horizons,
        outcome=outcomes,
        time_ns=listed(times, records),
        interval_ns=listed(spacing, m) or 0,
        target=listed(floats, records),
        yhat=np.array(listed(floats, m * horizons), np.float64).reshape(m, horizons),
        warming=listed(st.booleans(), m),
    )


@given(reports())
@settings(max_examples=300, deadline=None)
def test_every_forecast_reads_back_as_the_naive_encoder_says(report: StepReport) -> None:
    messages = encode(report)
    assert [json.loads(m.value) for m in messages] == naive_forecasts(report)
    assert [m.key.decode() for m in messages] == [v["series_id"] for v in naive_forecasts(report)]


@given(reports())
@settings(max_examples=50, deadline=None)
def test_a_forecast_s_bytes_are_compact_and_in_a_fixed_order(report: StepReport) -> None:
    for message, naive in zip(encode(report), naive_forecasts(report), strict=True):
        assert list(json.loads(message.value)) == list(naive)
        assert b'": ' not in message.value.replace(json.dumps(naive["series_id"])[1:-1].encode(), b"")


def test_the_bytes_are_those_of_the_documentation() -> None:
    report = make_report(
        keys=["host-1|cpu"], records=1, horizons=2, topic="metrics.raw", partition=3, first_offset=991,
        target=[41.2], yhat=np.array([[41.5, math.nan]]),
    )  # fmt: skip
    (message,) = encode(report)
    assert message == OutMessage(
        b"host-1|cpu",
        b'{"schema":1,"series_id":"host-1|cpu","cutoff":"2026-11-19T08:00:00Z","y":41.2,"status":"ready",'
        b'"forecasts":[{"horizon":1,"ds":"2026-11-19T08:00:10Z","yhat":41.5},'
        b'{"horizon":2,"ds":"2026-11-19T08:00:20Z","yhat":null}],'
        b'"model":{"version":"0.1.0","config":"01234567","revision":0,"update":7},'
        b'"source":{"topic":"metrics.raw","partition":3,"offset":991,"row":0}}',
        [],
        START_NS // 10**6,
    )


def test_floats_are_the_shortest_text_that_reads_back() -> None:
    values = [0.1, 1e22, 5e-324, 1.7976931348623157e308, -0.0, 1 / 3, 100.0]
    report = make_report(records=1, horizons=len(values), yhat=np.array([values]))
    (message,) = encode(report)
    text = [f.rsplit(b":", 1)[1].rstrip(b"}") for f in message.value.split(b"]")[0].split(b"},")]
    assert [float(t) for t in text] == values
    assert all(len(t) <= len(repr(v)) for t, v in zip(text, values, strict=True))


def test_how_records_were_divided_into_steps_changes_no_byte() -> None:
    whole = make_report(records=6, horizons=2, yhat=np.arange(12.0).reshape(6, 2))
    parts = [
        make_report(
            keys=[["a", "b"][i % 2]], records=1, horizons=2, first_offset=i,
            time_ns=[START_NS + i * SECOND_NS], target=[i], yhat=np.arange(12.0).reshape(6, 2)[i : i + 1], step=i + 1,
        )
        for i in range(6)
    ]  # fmt: skip
    assert [m for part in parts for m in encode(part)] == encode(whole)


def test_more_forecasts_than_one_chunk_are_all_there() -> None:
    report = make_report(records=150, horizons=1000)
    assert [json.loads(m.value) for m in encode(report)] == naive_forecasts(report)


def test_a_lone_surrogate_in_a_key_does_not_stop_the_stream() -> None:
    (message,) = encode(make_report(keys=["\ud800"], records=1))
    assert json.loads(message.value)["series_id"] == message.key.decode() == "\\ud800"


@pytest.mark.parametrize(
    ("time_ns", "broker_ns", "stamp_ns"),
    [
        (START_NS, START_NS + SECOND_NS, START_NS + SECOND_NS),
        (START_NS, START_NS - SECOND_NS, START_NS - SECOND_NS),
        (START_NS, -1, START_NS),
        (-5, -1, 0),
    ],
    ids=["a backfill", "ahead of the broker", "no broker", "before the epoch"],
)
def test_a_forecast_carries_the_timestamp_of_its_input_message(time_ns: int, broker_ns: int, stamp_ns: int) -> None:
    (message,) = encode(make_report(records=1, time_ns=[time_ns], broker_ns=[broker_ns]))
    assert message.timestamp_ms == stamp_ns // 10**6


@given(st.lists(st.tuples(st.integers(-62_135_596_800, 253_402_300_799), st.integers(0, SECOND_NS - 1)), max_size=5))
def test_times_are_those_of_datetime(times: list[tuple[int, int]]) -> None:
    text = format_times(np.array([s for s, _ in times], np.int64), np.array([n for _, n in times], np.int64))
    assert [t.decode() + "Z" for t in text] == [naive_time(s * SECOND_NS + n) for s, n in times]


def bad(offset: int, row: int = 0, reason: str = "schema") -> Rejected:
    return Rejected("in", 0, offset, row, reason, f"$.rows[{row}]", f"row {row} is no number")  # type: ignore[arg-type]  # because reason is a literal


def test_a_dead_letter_is_the_message_untouched_and_says_why() -> None:
    messages = make_messages(
        [b"good", b"\xff{bad"], key=[b"k0", b"k1"], headers=[[], [("trace", b"1"), ("trace", b"2")]]
    )
    report = make_report(records=1, undecoded=[bad(1)])
    (letter,) = encode_dead_letters(report, messages)
    assert letter.key == b"k1"
    assert letter.value == b"\xff{bad"
    assert letter.timestamp_ms == START_NS // 10**6 + 1000
    assert letter.headers == [
        ("trace", b"1"),
        ("trace", b"2"),
        ("streamlstm.error.reason", b"schema"),
        ("streamlstm.error.message", b"row 0 is no number"),
        ("streamlstm.error.path", b"$.rows[0]"),
        ("streamlstm.error.topic", b"in"),
        ("streamlstm.error.partition", b"0"),
        ("streamlstm.error.offset", b"1"),
        ("streamlstm.error.rows", b"0"),
        ("streamlstm.error.timestamp", b"2026-11-19T08:00:01Z"),
        ("streamlstm.error.version", b"0.1.0"),
    ]


@pytest.mark.parametrize(
    ("key", "value", "header"),
    [(1, 2 << 20, 1), (2 << 20, 1, 1), (1, 1, 2 << 20), (1, 921_600, 1), (400_000, 400_000, 400_000)],
    ids=["value", "key", "headers", "just too large", "all together"],
)
def test_a_dead_letter_always_fits_its_topic_and_says_what_was_cut(key: int, value: int, header: int) -> None:
    whole = b"v" * value
    messages = make_messages([whole], key=[b"k" * key], headers=[[("trace", b"h" * header)]])
    (letter,) = encode_dead_letters(make_report(records=0, undecoded=[bad(0)]), messages)
    headers = dict(letter.headers)
    assert letter.key == b"k" * min(key, 1 << 10)
    assert letter.value == whole[: 64 << 10]
    assert headers.get("trace") == (b"h" * header if header == 1 else None)
    assert headers["streamlstm.error.value_bytes"] == b"%d" % value
    assert headers["streamlstm.error.value_sha256"] == hashlib.sha256(whole).hexdigest().encode()


def test_a_dead_letter_that_fits_is_not_cut() -> None:
    messages = make_messages([b"v" * 900_000], key=[b"k" * 5000], headers=[[]])
    (letter,) = encode_dead_letters(make_report(records=0, undecoded=[bad(0)]), messages)
    assert (len(letter.key or b""), len(letter.value or b"")) == (5000, 900_000)
    assert "streamlstm.error.value_bytes" not in dict(letter.headers)


def test_a_field_name_as_long_as_the_message_fits_a_header() -> None:
    long = Rejected("in", 0, 0, 0, "schema", "$." + "x" * 2**20, "no " + "x" * 2**20)
    (letter,) = encode_dead_letters(make_report(records=0, undecoded=[long]), make_messages([b"v"]))
    assert sum(len(value or b"") for _, value in letter.headers) < 10_000


def test_several_bad_rows_of_one_message_are_one_dead_letter() -> None:
    report = make_report(
        records=1, undecoded=[bad(1, 7, "schema"), bad(1, 2, "non_finite")], refused=[bad(1, 3, "future")]
    )
    (letter,) = encode_dead_letters(report, make_messages([b"", b"x"]))
    headers = dict(letter.headers)
    assert headers["streamlstm.error.rows"] == b"2-3,7"
    assert headers["streamlstm.error.reason"] == b"non_finite"


def test_dead_letters_stand_in_the_order_of_the_cut_whichever_partition_they_came_from() -> None:
    cut = (Range("in", 1, 10, 13), Range("in", 0, 5, 9))
    messages = make_messages(
        [b"1-10", b"1-12", b"0-5", b"0-8"],
        cut=cut,
        range_index=np.array([0, 0, 1, 1], np.int32),
        offset=np.array([10, 12, 5, 8]),
    )
    report = make_report(
        records=1,
        undecoded=[Rejected("in", 0, 8, 0, "decode", "", ""), Rejected("in", 1, 12, 0, "decode", "", "")],
    )
    assert [m.value for m in encode_dead_letters(report, messages)] == [b"1-12", b"0-8"]


def test_a_tombstone_is_a_dead_letter_without_value() -> None:
    (letter,) = encode_dead_letters(make_report(records=0, undecoded=[bad(0)]), make_messages([None]))
    assert letter.value is None


def test_a_rejection_outside_the_cut_is_a_broken_promise() -> None:
    with pytest.raises(LookupError, match="in-0 @ 9"):
        encode_dead_letters(make_report(records=1, undecoded=[bad(9)]), make_messages([b""]))


def test_the_list_of_bad_rows_fits_a_header() -> None:
    report = make_report(records=0, undecoded=[bad(0, row) for row in range(0, 20_000, 2)])
    (letter,) = encode_dead_letters(report, make_messages([b""]))
    rows = dict(letter.headers)["streamlstm.error.rows"].decode()
    assert rows.startswith("0,2,4,")
    assert rows.endswith(",…")
    assert len(rows) <= 1002


def test_a_message_without_time_of_the_broker_has_none() -> None:
    messages = make_messages([b"x"], broker_ns=np.array([-1]))
    (letter,) = encode_dead_letters(make_report(records=0, undecoded=[bad(0)]), messages)
    assert letter.timestamp_ms is None
    assert dict(letter.headers)["streamlstm.error.timestamp"] == b""
