"""
Event times as int nanoseconds since the epoch, exactly: no time passes through a rounded float.

A time is taken as the producer wrote it: digits beyond the nanosecond are cut off, a float counts as its
shortest decimal, and text without a zone is UTC. Times beyond ±2⁶² ns (years 1823 to 2116) are refused,
so that the difference of any two fits 64 bits.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from streamlstm.records.batch import F64, I64
from streamlstm.records.values import Raw, Unfit

LIMIT_NS = 1 << 62
_DIGITS = {"s": 9, "ms": 6, "us": 3, "ns": 0}
_MAGNITUDES = ((10**11, 9), (10**14, 6), (10**17, 3))
"""``auto``: below the bound, a number has so many digits to the nanosecond; at or above all of them, none."""

_DECIMAL = re.compile(r"([+-]?)([0-9]{1,40})(?:\.([0-9]{0,40}))?")
_SCIENTIFIC = re.compile(r"[+-]?[0-9]{1,40}(?:\.[0-9]{0,40})?[eE][+-]?[0-9]{1,2}")
_FRACTION = re.compile(r"(.*[0-9])[.,]([0-9]+)([^0-9].*)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MEMO_SIZE = 1 << 16
LONGEST_TIME = 128
"""Characters of a time written as text."""

_OUTSIDE = Unfit("a time outside the years 1823 to 2116")


class TimeColumn(NamedTuple):
    """Times of a column: ``ns`` (0 where there is none), the places that are missing, and those that are unfit."""

    ns: I64
    missing: list[int]
    unfit: dict[int, Unfit]


def ns_of_decimal(text: str, unit: str) -> int | Unfit | None:
    """
    Nanoseconds of a plain decimal number, or ``None`` if the text is none.

    >>> ns_of_decimal("1700000000.123456789", "auto")
    1700000000123456789
    >>> ns_of_decimal("-1.5", "ms")
    -1500000
    """
    if (m := _DECIMAL.fullmatch(text)) is None:
        if _SCIENTIFIC.fullmatch(text):
            return ns_of_decimal(f"{Decimal(text):f}", unit)
        return None
    whole, fraction = int(m[2]), m[3] or ""
    digits = _digits(whole) if unit == "auto" else _DIGITS[unit]
    ns = whole * 10**digits + int("0" + fraction[:digits].ljust(digits, "0"))
    if ns > LIMIT_NS:
        return _OUTSIDE
    return -ns if m[1] == "-" else ns


def ns_of_float(x: float, unit: str) -> int | Unfit:
    """
    Nanoseconds of a number's shortest decimal.

    >>> ns_of_float(1700000000.1, "s"), ns_of_float(1700000000123.25, "auto")
    (1700000000100000000, 1700000000123250000)
    """
    if not abs(x) <= LIMIT_NS:
        return _OUTSIDE
    if abs(x) < 1e-9:
        return 0
    ns = ns_of_decimal(f"{Decimal(repr(x)):f}", unit)
    assert ns is not None
    return ns


def ns_of_iso8601(text: str) -> int | Unfit:
    """
    Nanoseconds of a date or a date and time in ISO 8601; without a zone it is UTC.

    >>> ns_of_iso8601("2026-11-20T08:00:00.000000001+01:00")
    1795158000000000001
    """
    return _iso8601(text)[0]


def ns_of_pattern(text: str, pattern: str) -> int | Unfit:
    """
    Nanoseconds by a strptime pattern; without a zone it is UTC.

    >>> ns_of_pattern("20.11.2026 08:00", "%d.%m.%Y %H:%M")
    1795161600000000000
    """
    try:
        return _ns(datetime.strptime(text, pattern), 0)  # noqa: DTZ007, because _ns takes a naive time as UTC
    except (ValueError, OverflowError):
        return Unfit(f"not a time of the form {pattern}")


def _iso8601(text: str) -> tuple[int | Unfit, bool]:
    """The time, and whether it stood without a zone."""
    extra = 0
    if ("." in text or "," in text) and (m := _FRACTION.fullmatch(text)):
        text, extra = m[1] + (m[3] or ""), int(m[2][:9].ljust(9, "0"))
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return Unfit("not an ISO 8601 time"), False
    return _ns(time, extra), time.tzinfo is None


def _ns(time: datetime, extra_ns: int) -> int | Unfit:
    since = (time.replace(tzinfo=UTC) if time.tzinfo is None else time) - _EPOCH
    ns = (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000 + extra_ns
    return ns if -LIMIT_NS <= ns <= LIMIT_NS else _OUTSIDE


def _digits(magnitude: int) -> int:
    return next((digits for bound, digits in _MAGNITUDES if magnitude < bound), 0)


@dataclass(slots=True)
class TimeReader:
    """
    Turns columns of raw times into nanoseconds, by one unit.

    Texts seen lately are remembered, because many series share a time; that changes no result. ``naive`` says
    whether an ISO 8601 text without a zone has been taken as UTC so far.
    """

    unit: str
    naive: bool
    _memo: dict[str, int | Unfit]

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.naive = False
        self._memo = {}

    def read(self, column: Sequence[Raw]) -> TimeColumn:
        """Every time of a column. ``None`` is missing; what is neither a number nor text is unfit."""
        kinds = set(map(type, column))
        if self.unit == "auto" or self.unit in _DIGITS:
            if kinds == {int}:
                try:
                    return self._integers(np.array(column, np.int64))
                except OverflowError:
                    pass  # at least one is beyond 64 bits: each for itself
            elif kinds == {float}:
                return self._floats(np.array(column, np.float64))
        return self._each(column)

    def _integers(self, x: I64) -> TimeColumn:
        factor = self._factors(x)
        limit = LIMIT_NS // factor
        fits = (x <= limit) & (x >= -limit)
        return TimeColumn(np.where(fits, x, 0) * factor, [], {int(i): _OUTSIDE for i in np.flatnonzero(~fits)})

    def _floats(self, x: F64) -> TimeColumn:
        """
        As :func:`ns_of_float`, at once for all that are whole, or have no more digits than the microsecond.

        ``u / 10⁶ == x`` says that x is the float nearest to the decimal u · 10⁻⁶. Of seconds below 2³³ two such
        decimals never share a float, so that decimal is also the shortest; LIMIT_NS lies below. The same holds for
        milliseconds with three digits below 2⁴³.
        """
        factor = self._factors(x)
        inside = np.abs(x) <= np.minimum(LIMIT_NS // factor, 1 << 53)
        safe = np.where(inside, x, 0.0)
        done = inside & (np.rint(safe) == safe)
        ns = np.where(done, safe, 0.0).astype(np.int64) * np.where(done, factor, 0)
        for unit, scale in ((10**9, 1e6), (10**6, 1e3)):
            part = np.rint(safe * scale)
            exact = ~done & inside & (factor == unit) & (part / scale == safe)
            ns[exact] = part[exact].astype(np.int64) * 1000
            done |= exact
        unfit: dict[int, Unfit] = {}
        for i in np.flatnonzero(~done):
            one = ns_of_float(float(x[i]), self.unit)
            if isinstance(one, Unfit):
                unfit[int(i)] = one
            else:
                ns[i] = one
        return TimeColumn(ns, [], unfit)

    def _factors(self, x: I64 | F64) -> I64:
        if self.unit != "auto":
            return np.full(len(x), 10 ** _DIGITS[self.unit], np.int64)
        inside = [(x < bound) & (x > -bound) for bound, _ in _MAGNITUDES]
        return np.select(inside, [np.int64(10**digits) for _, digits in _MAGNITUDES], np.int64(1))

    def _each(self, column: Sequence[Raw]) -> TimeColumn:
        ns = np.zeros(len(column), np.int64)
        missing: list[int] = []
        unfit: dict[int, Unfit] = {}
        for i, raw in enumerate(column):
            one = self._one(raw)
            if one is None:
                missing.append(i)
            elif isinstance(one, Unfit):
                unfit[i] = one
            else:
                ns[i] = one
        return TimeColumn(ns, missing, unfit)

    def _one(self, raw: Raw) -> int | Unfit | None:
        if raw is None or isinstance(raw, Unfit):
            return raw
        if isinstance(raw, bool):
            return Unfit("expected a time, found a boolean")
        if isinstance(raw, str) or "%" in self.unit:
            return self._remembered(str(raw))
        if self.unit == "iso8601":
            return Unfit("expected ISO 8601 text, found a number")
        return ns_of_float(raw, self.unit) if isinstance(raw, float) else ns_of_int(raw, self.unit)

    def _remembered(self, text: str) -> int | Unfit:
        if (one := self._memo.get(text)) is None:
            one = self._text(text)
            if len(self._memo) >= _MEMO_SIZE:
                self._memo.clear()
            self._memo[text[: LONGEST_TIME + 1]] = one
        return one

    def _text(self, text: str) -> int | Unfit:
        if len(text) > LONGEST_TIME:
            return Unfit(f"a time of more than {LONGEST_TIME} characters")
        if "%" in self.unit:
            return ns_of_pattern(text, self.unit)
        if self.unit != "iso8601" and (ns := ns_of_decimal(text, self.unit)) is not None:
            return ns
        if self.unit in _DIGITS:
            return Unfit(f"expected a number of {self.unit}, found text that is none")
        ns, naive = _iso8601(text)
        self.naive |= naive
        return ns


def ns_of_int(x: int, unit: str) -> int | Unfit:
    """
    Nanoseconds of a whole number.

    >>> ns_of_int(1700000000, "auto"), ns_of_int(-1, "ms")
    (1700000000000000000, -1000000)
    """
    ns = x * 10 ** (_digits(abs(x)) if unit == "auto" else _DIGITS[unit])
    return ns if -LIMIT_NS <= ns <= LIMIT_NS else _OUTSIDE
