"""From rows of files to keys and values."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlstm.cli.loading import json_of, key_finder
from streamlstm.config.model import Csv
from streamlstm.errors import ConfigError, DataError

cells = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=8).map(str.strip)


@given(st.lists(cells, min_size=1, max_size=5))
def test_whatever_the_cells_hold_a_row_becomes_one_object(values: list[str]) -> None:
    names = [f"c{i}" for i in range(len(values))]
    row = ",".join('"' + value.replace('"', '""') + '"' for value in values).encode()
    document = json.loads(json_of(names, Csv())(row))
    assert list(document) == names


@pytest.mark.parametrize(
    ("cell", "becomes"),
    [
        ("17", 17), ("-0.5", -0.5), ("1e3", 1000.0), ("", None), ("007", "007"), ("+1", "+1"), (".5", ".5"),
        ("NaN", "NaN"), ("Infinity", "Infinity"), ("0x1F", "0x1F"), ("1_000", "1_000"), ("true", "true"),
        ("a b", "a b"), ("\u0663", "\u0663"),
    ],
)  # fmt: skip
def test_a_cell_is_a_number_only_if_json_would_write_it_so(cell: str, becomes: Any) -> None:
    assert json.loads(json_of(["x"], Csv())(cell.encode())) == {"x": becomes}


def test_digits_survive_that_a_float_would_lose() -> None:
    assert json_of(["x"], Csv())(b"12345678901234567890.10") == b'{"x":12345678901234567890.10}'


def test_a_decimal_comma_becomes_a_point_and_a_point_is_then_text() -> None:
    convert = json_of(["a", "b"], Csv(delimiter=";", decimal=","))
    assert convert(b"1,5;1.5") == b'{"a":1.5,"b":"1.5"}'


@pytest.mark.parametrize("row", [b"1,2,3", b"1", b'"open,2', b"\xff,2"])
def test_a_row_that_fits_no_header_ends_it_with_65(row: bytes) -> None:
    with pytest.raises(DataError, match="row"):
        json_of(["a", "b"], Csv())(row)


def test_a_key_path_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="--key host: "):
        key_finder("host")


@pytest.mark.parametrize("document", [b"no json", b'{"host": {"a": 1}}', b'{"host": ["a"]}', b"[" * 100_000])
def test_a_line_without_a_usable_key_ends_it_with_65(document: bytes) -> None:
    with pytest.raises(DataError, match=r"--key \$\.host: "):
        key_finder("$.host")(document)
