from typing import Any

import pytest
from cuts import decode_section

from streamlstm.errors import ConfigError
from streamlstm.records.mapping import FIELD, Meta, compile_plan, parse_column, parse_path
from streamlstm.records.values import Unfit


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("$.a.b[0].c", ("a", "b", 0, "c")),
        ("$['odd key']", ("odd key",)),
        ('$["it\'s"].b', ("it's", "b")),
        ("$.a['x.y'][12]", ("a", "x.y", 12)),
        ("$.@timestamp", ("@timestamp",)),
        ("$.cpu-total", ("cpu-total",)),
        ("$.größe", ("größe",)),
        ("$", ()),
        ("@.x", ("x",)),
        ("@[1]", (1,)),
        ("@", ()),
    ],
)
def test_a_path_is_its_steps(text: str, steps: tuple[str | int, ...]) -> None:
    path = parse_path(text)
    assert path.steps == steps
    assert path.relative == text.startswith("@")


@pytest.mark.parametrize(
    "text",
    ["", "a", ".a", "$a", "$.", "$..a", "$.a.", "$[", "$[-1]", "$['a]", "$.a b", "$.a[x]", "$.*", "@a", "$.a[0"],
)
def test_a_path_that_cannot_be_read_says_how_it_should_be(text: str) -> None:
    with pytest.raises(ValueError, match=r"\$\.value|write \.name"):
        parse_path(text)


@pytest.mark.parametrize("name", ["PT08.S1(CO)", "NO2(GT)", "a b", "x[0]", "it's", "*"])
def test_a_column_is_named_as_the_header_has_it(name: str) -> None:
    assert parse_column(f"$.{name}").steps == (name,)


def test_a_column_may_be_quoted() -> None:
    assert parse_column("$['a b']").steps == ("a b",)
    with pytest.raises(ValueError, match="columns only"):
        parse_column("@.x")


def problems(columns: list[str] | None = None, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        compile_plan(decode_section(**keys), columns)
    return str(caught.value)


def test_every_problem_is_told_with_its_key_and_its_fix() -> None:
    text = problems(
        series_id=["$.a", "$.b["],
        timestamp={"path": ["$.d", "$.e..f"]},
        target={"x": "$.x", "y": "$.y[", "z": "@.z"},
    )
    assert [line.partition(":")[0] for line in text.splitlines()] == [
        "decode.series_id[1]",
        "decode.timestamp.path[1]",
        "decode.target.y",
        "decode.target.z",
    ]
    assert "needs decode.explode" in text


def test_a_wildcard_stands_at_the_end_only() -> None:
    assert "decode.target" in problems(target="$.a.*.b")
    assert "decode.target.x" in problems(target={"x": "$.a.*"})


def test_an_item_is_asked_of_an_array_only() -> None:
    assert parse_path("$.a[0]").find({"a": {"0": 1}}) == Unfit("expected an array, found an object")


def test_an_empty_map_is_no_target() -> None:
    assert "name at least one" in problems(target={})


def test_explode_starts_at_the_message() -> None:
    assert "start it with $" in problems(explode="@.x")


def test_one_number_does_not_come_from_two_paths() -> None:
    assert "strptime" in problems(timestamp={"path": ["$.d", "$.e"], "unit": "ms"})


def test_an_unknown_column_is_refused_with_those_there_are() -> None:
    assert "the header has ds, y" in problems(
        ["ds", "y"], format="csv", series_id=["@topic"], timestamp={"path": "$.t"}
    )


def test_csv_has_no_depth_and_nothing_beside_the_row() -> None:
    columns = ["id", "t", "y"]
    assert "decode.explode" in problems(columns, format="csv", explode="$.a")
    assert "has no key" in problems(columns, format="csv", series_id=["@key"])
    assert "has no header" in problems(columns, format="csv", series_id=["@header.x"])
    assert "$.* is every number" in problems(columns, format="csv", target="$.a.*")
    assert "no column is left" in problems(["id", "t"], format="csv", target="$.*")
    assert "csv is for files" in problems(None, format="csv")


def test_several_targets_append_their_name_to_the_series_id() -> None:
    def parts(**keys: Any) -> tuple[Any, ...]:
        return compile_plan(decode_section(**keys)).parts

    assert parts(target={"a": "$.a", "b": "$.b"})[-1] == FIELD
    assert parts(target="$.*")[-1] == FIELD
    assert FIELD not in parts(target="$.y")
    assert FIELD not in parts(target={"a": "$.a"})
    assert parts(target="$.*", series_id=["@field", "@header.x"]) == (FIELD, Meta("header", "x"))


def test_a_wildcard_leaves_out_the_time_and_the_series_id() -> None:
    wildcard = compile_plan(
        decode_section(target="$.*", series_id=["$.id", "$.tags.id2"], timestamp={"path": ["$.d", "$.h"]})
    ).wildcard
    assert wildcard is not None
    assert wildcard.excluded == {"id", "d", "h"}
