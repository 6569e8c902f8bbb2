"""A message without a value: no record, and what it means is configured."""

from typing import Any

import pytest
from cuts import decoder, keys_of, messages, reasons

from streamlstm.config.model import Config
from streamlstm.records.batch import SeriesId

KEYED: dict[str, Any] = {"series_id": ["@key"], "tombstone": "reset"}


def resets(batch) -> list[tuple[int, str]]:
    """Before which record, and of which series."""
    return [(at, batch.series[q].key) for at, q in zip(batch.reset_at.tolist(), batch.reset_code.tolist(), strict=True)]


def test_a_tombstone_is_passed_over_and_counted() -> None:
    batch = decoder().decode(messages(b'{"id":"a","t":5,"y":1}', None, b'{"id":"a","t":6,"y":1}', None))
    assert (len(batch), batch.rejected, batch.skipped, batch.consumed) == (2, (), 2, 4)
    assert resets(batch) == []


def test_a_tombstone_may_be_a_fault() -> None:
    batch = decoder(tombstone="dead_letter").decode(messages(None, b'{"id":"a","t":6,"y":1}'))
    assert reasons(batch) == [(0, 0, "decode", "")]
    assert (len(batch), batch.skipped) == (1, 0)


def test_an_empty_value_is_no_tombstone() -> None:
    assert reasons(decoder().decode(messages(b""))) == [(0, 0, "decode", "")]


def test_a_tombstone_resets_the_series_of_its_key_where_it_stands() -> None:
    value = b'{"t":5,"y":1}'
    given = messages(None, value, value, None, None, value, None, keys=[b"a", b"a", b"b", b"b", b"c", b"b", b"a"])
    batch = decoder(**KEYED).decode(given)
    assert keys_of(batch) == ["a", "b", "b"]
    assert resets(batch) == [(0, "a"), (2, "b"), (2, "c"), (3, "a")]
    assert batch.series == tuple(SeriesId("in", 0, key) for key in "abc")
    assert batch.skipped == 4


def test_a_tombstone_resets_every_target_of_its_key() -> None:
    d = decoder(**KEYED, target={"cpu": "$.c", "mem": "$.m"})
    batch = d.decode(messages(None, b'{"t":5,"m":1,"c":2}', None, keys=[b"x", b"y", b"y"]))
    assert keys_of(batch) == ["y|cpu", "y|mem"]
    assert resets(batch) == [(0, "x|cpu"), (0, "x|mem"), (2, "y|cpu"), (2, "y|mem")]


def test_a_header_may_name_the_series_too() -> None:
    d = decoder(series_id=["@header.h", "@topic", "@partition"], tombstone="reset")
    batch = d.decode(messages(None, headers=[[("h", b"1"), ("h", b"2")]], partition=3))
    assert resets(batch) == [(0, "2|in|3")]


@pytest.mark.parametrize(
    ("key", "reason"),
    [(None, "mapping"), (b"\xff", "decode"), (b"k" * 2000, "oversize")],
    ids=["none", "not UTF-8", "too long"],
)
def test_a_tombstone_that_names_no_series_is_a_dead_letter(key: bytes | None, reason: str) -> None:
    batch = decoder(**KEYED).decode(messages(None, None, keys=[key, b"a"]))
    assert reasons(batch) == [(0, 0, reason, "@key")]
    assert (batch.skipped, resets(batch)) == (1, [(0, "a")])


def refused(**decode: Any) -> str:
    section = {"timestamp": {"path": "$.t"}, "target": "$.y", "tombstone": "reset", **decode}
    with pytest.raises(ValueError, match=r"decode\.tombstone") as caught:
        Config.model_validate({"source": {"type": "files"}, "decode": section})
    return str(caught.value)


def test_a_reset_needs_a_series_named_beside_the_message() -> None:
    assert "a tombstone has no $.id to say which series is meant" in refused(series_id=["@key", "$.id"])
    assert "has no @.id" in refused(series_id=["@.id"], explode="$.rows")


def test_a_reset_needs_targets_with_names() -> None:
    assert "does not say which fields there were" in refused(series_id=["@key"], target="$.*")
