import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamlstm.records.values import (
    FLOAT32_MAX,
    NON_FINITE,
    NOT_A_NUMBER,
    Raw,
    Unfit,
    number,
    number_of_text,
    numbers,
    numbers_of_text,
    text_of,
)


def same(a: object, b: object) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize(
    "text", ["1_000", "0x1F", "", " 1", "1 ", "one", "1,5", "--1", "1e", ".", "١", "9" * 401, "1.2.3"]
)
def test_text_that_is_not_strictly_a_number_is_none(text: str) -> None:
    assert number_of_text(text) is NOT_A_NUMBER
    assert numbers_of_text([text, "1"]).unfit == {0: NOT_A_NUMBER}


@pytest.mark.parametrize("raw", ["Inf", "-infinity", "+INF", "1e400", 1e39, -1e39, 10**400, float("inf"), 3.5e38])
def test_what_a_float32_cannot_hold_is_not_finite(raw: Raw) -> None:
    assert number(raw) is NON_FINITE
    assert numbers([raw, 1.0]).unfit == {0: NON_FINITE}


def test_the_largest_float32_is_a_number() -> None:
    assert number(FLOAT32_MAX) == np.finfo(np.float32).max
    assert not numbers([-FLOAT32_MAX]).unfit


def test_missing_is_nan() -> None:
    assert all(math.isnan(number(raw)) for raw in (None, "NaN", "-nan") if not isinstance(number(raw), Unfit))
    assert np.isnan(numbers([None, "NaN", None]).values).all()


def test_a_boolean_is_no_number() -> None:
    assert numbers([True, 1.0, 2]).unfit.keys() == {0}


raws = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(["1.5", "nan", "-inf"])
)


@given(st.lists(raws, max_size=8))
@example([1, 2.0, None])
@example([10**400, 1.0])
@example([float("nan"), "1"])
def test_a_column_of_numbers_is_read_like_each(column: list[Raw]) -> None:
    values, unfit = numbers(column)
    for i, raw in enumerate(column):
        assert same(unfit.get(i, float(values[i])), number(raw))


cells = st.one_of(
    st.text(max_size=6),
    st.floats().map(str),
    st.from_regex(r"[+-]?[0-9]{0,3}[.,]?[0-9]{0,3}(e[0-9])?", fullmatch=True),
    st.sampled_from(["nan", "inf", "1_0", " 1", "1\n", "٣"]),
)


@given(st.lists(cells, max_size=8), st.sampled_from([".", ","]))
@example(["1" * 401, "2"], ".")
def test_a_column_of_text_is_read_like_each(column: list[str], decimal: str) -> None:
    values, unfit = numbers_of_text(column, decimal)
    for i, text in enumerate(column):
        assert same(unfit.get(i, float(values[i])), number_of_text(text, decimal))


def test_a_decimal_comma_takes_no_points() -> None:
    assert number_of_text("1.234,5", ",") is NOT_A_NUMBER
    assert number_of_text("1,5", ",") == 1.5


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_that_differ_have_different_text(x: float) -> None:
    assert float(str(text_of(x))) == x
