"""
Raw values as they stood in a message, and what they become: numbers and text.

A number is a JSON number, or text that is strictly one (``"98765"``, ``"-1.5e3"``): some producers quote every
number. ``null``, an absent field and NaN are *missing*; infinities and what a float32 cannot hold are not numbers
anyone can learn from; ``true``, ``"12 ms"`` and ``"0x1F"`` are no numbers at all.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from streamlstm.records.batch import F64, Reason

FLOAT32_MAX = 3.4028234663852886e38
LONGEST_NUMBER = 400
"""Characters of a number written as text; a float64 needs fewer."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_FLOAT_TAKES_TOO = re.compile(r"[\s_]")
_NAN = re.compile(r"[+-]?nan", re.IGNORECASE)
_INFINITE = re.compile(r"[+-]?inf(?:inity)?", re.IGNORECASE)


class Unfit(NamedTuple):
    """What stands in a message cannot be used: ``message`` says why, and holds no payload."""

    message: str
    reason: Reason = "schema"


Raw = str | int | float | bool | Unfit | None
"""``None`` is absent or null; :class:`Unfit` is an object or array where a value was wanted."""

NON_FINITE = Unfit("not finite, or too large for a float32", "non_finite")
NOT_A_NUMBER = Unfit("expected a number, found text that is none")
NAN = float("nan")


class NumberColumn(NamedTuple):
    """``values`` are NaN where missing or unfit; ``unfit`` names the places of the latter."""

    values: F64
    unfit: dict[int, Unfit]


def kind(node: object) -> str:
    """
    What JSON calls this.

    >>> kind(True), kind(1.5), kind([])
    ('a boolean', 'a number', 'an array')
    """
    names: Mapping[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "an array",
        dict: "an object",
        type(None): "null",
    }
    return names[type(node)]


def number_of_text(text: str, decimal: str = ".") -> float | Unfit:
    """
    A number from text; NaN where the text says so.

    >>> number_of_text("98765"), number_of_text("1,5", decimal=","), number_of_text("NaN")
    (98765.0, 1.5, nan)
    >>> number_of_text("+Inf").reason, number_of_text("1_000").reason
    ('non_finite', 'schema')
    """
    if len(text) > LONGEST_NUMBER:
        return NOT_A_NUMBER
    if decimal != "." and "." not in text:
        text = text.replace(decimal, ".")
    elif decimal != ".":
        return NOT_A_NUMBER
    if _NUMBER.fullmatch(text):
        return _within_float32(float(text))
    if _NAN.fullmatch(text):
        return NAN
    return NON_FINITE if _INFINITE.fullmatch(text) else NOT_A_NUMBER


def number(raw: Raw) -> float | Unfit:
    """
    A number from a raw value; NaN where it is missing.

    >>> number(3), number("3.5"), number(None), number(True).message
    (3.0, 3.5, nan, 'expected a number, found a boolean')
    """
    if raw is None:
        return NAN
    if isinstance(raw, Unfit):
        return raw
    if isinstance(raw, str):
        return number_of_text(raw)
    if isinstance(raw, bool):
        return Unfit("expected a number, found a boolean")
    try:
        return _within_float32(float(raw))
    except OverflowError:  # an int beyond every float
        return NON_FINITE


def numbers(column: Sequence[Raw]) -> NumberColumn:
    """Every number of a column: as :func:`number` each, at once where all are numbers."""
    if set(map(type, column)) <= {float, int, type(None)}:
        try:
            return finite(np.array(column, np.float64))
        except OverflowError:
            pass  # at least one int is beyond every float: each for itself
    return _split([number(raw) for raw in column])


def numbers_of_text(column: Sequence[str], decimal: str = ".") -> NumberColumn:
    """Every number of a column of text: as :func:`number_of_text` each, at once where all are plain numbers."""
    if _is_plain(column):
        try:
            if decimal == ".":
                return finite(np.array(list(map(float, column)), np.float64))
            if not any("." in text for text in column):
                return finite(np.array([float(text.replace(decimal, ".")) for text in column], np.float64))
        except ValueError:
            pass  # at least one is no number: each for itself
    return _split([number_of_text(text, decimal) for text in column])


def finite(values: F64) -> NumberColumn:
    """The values, with what is infinite or overflows a float32 taken out."""
    with np.errstate(invalid="ignore"):
        bad = np.abs(values) > FLOAT32_MAX
    if not bad.any():
        return NumberColumn(values, {})
    return NumberColumn(np.where(bad, NAN, values), {int(i): NON_FINITE for i in np.flatnonzero(bad)})


def text_of(raw: Raw) -> str | Unfit | None:
    """
    A value as part of a name: text as it is, numbers in one canonical form, ``None`` where it is missing.

    >>> text_of("a"), text_of(17), text_of(17.0), text_of(0.5), text_of(True)
    ('a', '17', '17', '0.5', 'true')
    """
    if raw is None or isinstance(raw, str | Unfit):
        return raw
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, float):
        return str(int(raw)) if raw.is_integer() and abs(raw) < 2**53 else repr(raw)
    return str(raw)


def _is_plain(column: Sequence[str]) -> bool:
    """Whether ``float`` takes nothing in this column that :func:`number_of_text` would not."""
    whole = "".join(column)
    if not whole.isascii() or _FLOAT_TAKES_TOO.search(whole):
        return False
    return len(whole) <= LONGEST_NUMBER or max(map(len, column)) <= LONGEST_NUMBER


def _within_float32(x: float) -> float | Unfit:
    return NON_FINITE if abs(x) > FLOAT32_MAX else x


def _split(each: list[float | Unfit]) -> NumberColumn:
    unfit = {i: one for i, one in enumerate(each) if isinstance(one, Unfit)}
    return NumberColumn(np.array([NAN if isinstance(one, Unfit) else one for one in each], np.float64), unfit)
