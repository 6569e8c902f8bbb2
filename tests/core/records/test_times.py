from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamlstm.records.times import LIMIT_NS, LONGEST_TIME, TimeReader
from streamlstm.records.values import Raw, Unfit

S = 10**9


def read(unit: str, *column: Raw) -> list[int | Unfit | None]:
    ns, missing, unfit = TimeReader(unit).read(list(column))
    return [None if i in missing else unfit.get(i, int(ns[i])) for i in range(len(column))]


def test_auto_takes_numbers_by_magnitude() -> None:
    assert read("auto", 99_999_999, 99_999_999_999_9, 99_999_999_999_999_9, 1_700_000_000_000_000_001) == [
        99_999_999 * S,
        99_999_999_999_9 * 10**6,
        99_999_999_999_999_9 * 10**3,
        1_700_000_000_000_000_001,
    ]


@pytest.mark.parametrize(("bound", "below", "at"), [(10**11, None, 10**6), (10**14, None, 10**3), (10**17, None, 1)])
def test_auto_changes_unit_at_its_bounds(bound: int, below: None, at: int) -> None:
    assert isinstance(read("auto", bound - 1)[0], Unfit)  # 1e11 s lies in the year 5138
    assert read("auto", bound) == [bound * at]
    assert read("auto", -bound) == [-bound * at]


def test_integers_of_nanoseconds_lose_nothing() -> None:
    assert read("ns", 1_700_000_000_123_456_789) == [1_700_000_000_123_456_789]
    assert read("auto", "1700000000123456789") == [1_700_000_000_123_456_789]


def test_decimal_text_is_exact_to_the_nanosecond_and_cut_off_there() -> None:
    assert read("s", "1700000000.1234567899") == [1_700_000_000_123_456_789]
    assert read("s", "-0.5", "1.", "1e3", "1.5E3") == [-S // 2, S, 1000 * S, 1500 * S]


def test_a_float_counts_as_its_shortest_decimal() -> None:
    assert read("s", 1_700_000_000.1) == [1_700_000_000_100_000_000]
    assert read("s", 1_700_000_000.123456) == [1_700_000_000_123_456_000]
    assert read("ms", 1_700_000_000_123.25) == [1_700_000_000_123_250_000]


@given(st.lists(st.floats(-4.6e9, 4.6e9), min_size=1), st.sampled_from(["s", "ms", "auto"]))
@example([1e-9, 5e-10, 2.0**32 - 2.0**-20, 4294967295.999999, 0.1 + 0.2], "s")
@example([4611686018.0, 4611686017.999999, 4611686017.9999995, 4611686000.1234567], "s")
@example([4611686018427.0, 4611686018426.999, 4611686018426.9995, 4611686018000.1234], "ms")
def test_a_column_of_floats_is_read_like_each_decimal(column: list[float], unit: str) -> None:
    for x, ns in zip(column, read(unit, *column), strict=True):
        exact = int(Decimal(repr(x)).scaleb(6 if unit == "ms" else 9))
        assert ns == exact if abs(exact) <= LIMIT_NS else isinstance(ns, Unfit)


@given(st.lists(st.decimals(-4 * 10**9, 4 * 10**9, places=6), min_size=1))
def test_seconds_with_microseconds_survive_json(column: list[Decimal]) -> None:
    assert read("s", *map(float, column)) == [int(x.scaleb(9)) for x in column]


@given(st.integers(-(2**70), 2**70), st.sampled_from(["s", "ms", "us", "ns", "auto"]))
def test_a_column_of_integers_is_read_like_each(x: int, unit: str) -> None:
    together, alone = read(unit, x, 5)[0], read(unit, x, 5, None)[0]
    assert together == alone
    assert isinstance(together, Unfit) or abs(together or 0) <= LIMIT_NS


def test_times_whose_difference_would_not_fit_are_refused() -> None:
    assert read("ns", LIMIT_NS, -LIMIT_NS) == [LIMIT_NS, -LIMIT_NS]
    for beyond in (LIMIT_NS + 1, -LIMIT_NS - 1, 2**63, 10**300, 1e300, float("inf"), "9" * 30, "1e99"):
        assert isinstance(read("ns", beyond)[0], Unfit)
    assert isinstance(read("iso8601", "0001-01-01T00:00:00+14:00")[0], Unfit)
    assert isinstance(read("iso8601", "9999-12-31")[0], Unfit)


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("2026-11-20T08:00:00Z", 1_795_161_600 * S),
        ("2026-11-20T08:00:00+01:00", 1_795_158_000 * S),
        ("2026-11-20 08:00:00", 1_795_161_600 * S),
        ("2026-11-20T08:00", 1_795_161_600 * S),
        ("2026-11-20", 1_795_132_800 * S),
        ("20261120T080000Z", 1_795_161_600 * S),
        ("2026-11-20T08:00:00.5Z", 1_795_161_600 * S + S // 2),
        ("2026-11-20T08:00:00,000000001-00:30", 1_795_163_400 * S + 1),
        ("2026-11-20T08:00:00.1234567891Z", 1_795_161_600 * S + 123_456_789),
        ("1969-12-31T23:59:59.75Z", -S // 4),
    ],
)
def test_iso_8601_is_read_exactly(text: str, ns: int) -> None:
    assert read("iso8601", text) == [ns]
    assert read("auto", text) == [ns]


@given(st.datetimes(datetime(1830, 1, 1), datetime(2110, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001, because hypothesis adds the zone
def test_iso_8601_goes_round(time: datetime) -> None:
    since = time - datetime(1970, 1, 1, tzinfo=UTC)
    assert read("auto", time.isoformat()) == [(since.days * 86400 + since.seconds) * S + since.microseconds * 1000]


def test_a_text_without_a_zone_is_utc_and_noticed() -> None:
    reader = TimeReader("auto")
    reader.read(["2026-11-20T08:00:00Z"])
    assert not reader.naive
    assert reader.read(["2026-11-20T08:00:00"]).ns.tolist() == [1_795_161_600 * S]
    assert reader.naive


def test_eight_digits_are_a_date_only_where_iso_8601_is_asked_for() -> None:
    assert read("iso8601", "20261120") == [1_795_132_800 * S]
    assert read("auto", "20261120") == [20_261_120 * S]


def test_a_pattern_reads_text_and_numbers() -> None:
    assert read("%m/%d/%Y %H:%M", "1/2/2010 3:00") == [1_262_401_200 * S]
    assert read("%Y%m%d", 20261120) == [1_795_132_800 * S]
    assert read("%Y-%m-%d %H:%M%z", "2026-11-20 08:00+0100") == [1_795_158_000 * S]


@pytest.mark.parametrize(
    ("unit", "raw"),
    [
        ("auto", "yesterday"),
        ("auto", ""),
        ("auto", True),
        ("auto", "١٢٣"),
        ("auto", "1_000"),
        ("auto", " 1"),
        ("auto", "nan"),
        ("s", "2026-11-20"),
        ("iso8601", 1_700_000_000),
        ("%Y", "x"),
        ("%Y", True),
        ("auto", "1" * (LONGEST_TIME + 1)),
        ("auto", Unfit("expected a value, found an array")),
    ],
)
def test_what_is_no_time_is_said_to_be_unfit(unit: str, raw: Raw) -> None:
    assert isinstance(read(unit, raw)[0], Unfit)
    assert isinstance(read(unit, raw, 1)[0], Unfit)


def test_null_is_missing() -> None:
    assert read("s", 1, None, "2") == [S, None, 2 * S]


@given(st.lists(st.one_of(st.text(max_size=12), st.integers(), st.floats(), st.none(), st.booleans()), max_size=5))
def test_the_memory_of_texts_changes_no_result(column: list[Raw]) -> None:
    for unit in ("auto", "iso8601", "%d.%m.%y", "ms"):
        reader = TimeReader(unit)
        assert reader.read([*column, *column]).ns.tolist() == [
            *reader.read(column).ns,
            *TimeReader(unit).read(column).ns,
        ]
