import math
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from cuts import BROKER_NS, decode_section, decoder, keys_of, messages, reasons
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamlstm.records.batch import REASONS, Messages, Range, RecordBatch, SeriesId
from streamlstm.records.columns import Assembler
from streamlstm.records.decode import Decoder
from streamlstm.records.json import DEEPEST, JsonReader, depth
from streamlstm.records.mapping import compile_plan

S = 10**9


def test_a_message_becomes_a_record() -> None:
    batch = decoder().decode(
        messages(b'{"id":"a","t":5,"y":1.5}', b'{"id":"b","t":6,"y":2}', b'{"y":3,"t":7,"id":"a"}')
    )
    assert batch.series == (SeriesId("in", 0, "a"), SeriesId("in", 0, "b"))
    assert batch.code.tolist() == [0, 1, 0]
    assert batch.time_ns.tolist() == [5 * S, 6 * S, 7 * S]
    assert batch.target.tolist() == [1.5, 2.0, 3.0]
    assert batch.offset.tolist() == [0, 1, 2]
    assert batch.row.tolist() == [0, 0, 0]
    assert batch.broker_ns.tolist() == [BROKER_NS] * 3
    assert batch.rejected == ()
    types = {
        name: getattr(batch, name).dtype.str for name in ("code", "range_index", "offset", "row", "time_ns", "target")
    }
    assert types == {
        "code": "<i4",
        "range_index": "<i4",
        "offset": "<i8",
        "row": "<i4",
        "time_ns": "<i8",
        "target": "<f8",
    }


def test_nested_and_odd_names_are_found() -> None:
    d = decoder(series_id=["$.tags.host", "$['odd \"key\"']"], target="$.m['x.y'].v", timestamp={"path": "$.m.t"})
    batch = d.decode(messages(b'{"tags":{"host":"h"},"odd \\"key\\"":"o","m":{"x.y":{"v":9},"t":5}}'))
    assert keys_of(batch) == ["h|o"]
    assert batch.target.tolist() == [9.0]


def test_an_item_of_an_array_is_found() -> None:
    batch = decoder(target="$.v[1]").decode(messages(b'{"id":"a","t":1,"v":[1,2]}', b'{"id":"a","t":2,"v":[1]}'))
    assert batch.target[0] == 2.0
    assert math.isnan(batch.target[1])


@pytest.mark.parametrize("y", ["null", '"NaN"', None])
@pytest.mark.parametrize("extra", [{}, {"explode": "$.o", "target": "@.y"}], ids=["plain", "explode"])
def test_a_target_that_is_null_absent_or_nan_is_missing(y: str | None, extra: dict[str, Any]) -> None:
    field = "" if y is None else f'"y":{y}'
    value = f'{{"id":"a","t":1,"o":[{{{field}}}]{"," if field else ""}{field}}}'.encode()
    batch = decoder(**extra).decode(messages(value))
    assert np.isnan(batch.target).tolist() == [True]
    assert batch.rejected == ()


def test_a_number_that_is_quoted_is_a_number() -> None:
    batch = decoder().decode(messages(b'{"id":"a","t":"5","y":"98765"}', b'{"id":"a","t":"6.5","y":"-1.5e3"}'))
    assert batch.target.tolist() == [98765.0, -1500.0]
    assert batch.time_ns.tolist() == [5 * S, 13 * S // 2]


@pytest.mark.parametrize(
    ("value", "reason", "path"),
    [
        (b"", "decode", ""),
        (b"{", "decode", ""),
        (b'{"id":"a","t":1,"y":NaN}', "decode", ""),
        (b'{"id":"a","t":1,"y":Infinity}', "decode", ""),
        (b'{"id":"\xff","t":1,"y":1}', "decode", ""),
        (b'{"id":"\\ud800","t":1,"y":1}', "decode", ""),
        (b'{"id":"a","t":1,"y":1} x', "decode", ""),
        (b'{"id":"a","t":1,"y":1' + b"0" * 5000 + b"}", "decode", ""),
        (b'{"id":"a","t":1,"y":' + b"[" * 300 + b"]" * 300 + b"}", "decode", ""),
        (b'{"id":"a","t":1,"y":1,"pad":"' + b"x" * 2000 + b'"}', "oversize", ""),
        (b"5", "schema", "$.id"),
        (b"null", "mapping", "$.id"),
        (b"[]", "schema", "$.id"),
        (b'{"t":1,"y":1}', "mapping", "$.id"),
        (b'{"id":null,"t":1,"y":1}', "mapping", "$.id"),
        (b'{"id":{},"t":1,"y":1}', "schema", "$.id"),
        (b'{"id":"a","y":1,"t":"soon"}', "schema", "$.t"),
        (b'{"id":"a","y":1,"t":true}', "schema", "$.t"),
        (b'{"id":"a","y":1,"t":[1]}', "schema", "$.t"),
        (b'{"id":"a","y":1,"t":1e30}', "schema", "$.t"),
        (b'{"id":"a","t":1,"y":true}', "schema", "$.y"),
        (b'{"id":"a","t":1,"y":"high"}', "schema", "$.y"),
        (b'{"id":"a","t":1,"y":[1]}', "schema", "$.y"),
        (b'{"id":"a","t":1,"y":"+Inf"}', "non_finite", "$.y"),
        (b'{"id":"a","t":1,"y":1e400}', "non_finite", "$.y"),
        (b'{"id":"a","t":1,"y":1e39}', "non_finite", "$.y"),
        (b'{"id":"a","t":1,"y":-1' + b"0" * 400 + b"}", "non_finite", "$.y"),
    ],
)
def test_a_bad_message_is_rejected_for_its_reason(value: bytes, reason: str, path: str) -> None:
    batch = decoder(max_bytes=6000 if reason == "decode" else 1000).decode(messages(value, start=7))
    assert len(batch) == 0
    assert batch.series == ()
    assert reasons(batch) == [(7, 0, reason, path)]


def test_a_bad_message_does_not_touch_its_neighbours() -> None:
    good = b'{"id":"a","t":1,"y":1}'
    batch = decoder().decode(messages(good, b"{", good, None, b'{"id":"b","t":1,"y":true}', good))
    assert batch.offset.tolist() == [0, 2, 5]
    assert [r.offset for r in batch.rejected] == [1, 4]
    assert batch.skipped == 1
    assert [series.key for series in batch.series] == ["a"]


def test_a_field_that_is_not_needed_may_hold_anything() -> None:
    assert len(decoder().decode(messages(b'{"id":"a","t":1,"y":1,"z":1e400,"w":[[{}]]}'))) == 1


def test_of_a_name_given_twice_the_last_counts() -> None:
    assert decoder().decode(messages(b'{"id":"a","t":1,"y":1,"y":2}')).target.tolist() == [2.0]
    assert decoder().decode(messages(b'{"id":"a","t":1,"y":true,"y":3}')).target.tolist() == [3.0]


def test_absent_and_null_objects_on_the_way_are_missing() -> None:
    d = decoder(target="$.m.y")
    batch = d.decode(messages(b'{"id":"a","t":1}', b'{"id":"a","t":2,"m":null}', b'{"id":"a","t":3,"m":{}}'))
    assert np.isnan(batch.target).tolist() == [True] * 3
    assert reasons(d.decode(messages(b'{"id":"a","t":1,"m":7}'))) == [(0, 0, "schema", "$.m.y")]


# Series ids


def test_parts_are_joined_and_numbers_have_one_form() -> None:
    d = decoder(series_id=["$.a", "$.b"])
    batch = d.decode(
        messages(
            b'{"a":1,"b":true,"t":1,"y":1}', b'{"a":1.0,"b":false,"t":1,"y":1}', b'{"a":0.5,"b":"","t":1,"y":1}',
            b'{"a":12345678901234567890,"b":"x","t":1,"y":1}',
        )
    )  # fmt: skip
    assert keys_of(batch) == ["1|true", "1|false", "0.5|", "12345678901234567890|x"]


def test_one_true_and_one_are_three_names() -> None:
    batch = decoder().decode(
        messages(*(b'{"id":%s,"t":1,"y":1}' % v for v in (b"1", b"true", b'"1"', b'"true"', b"1.0")))
    )
    assert keys_of(batch) == ["1", "true", "1", "true", "1"]
    assert len(batch.series) == 2


@given(st.lists(st.tuples(st.text("a|\\", max_size=4), st.text("a|\\", max_size=4)), min_size=2, max_size=6))
@example([("a|", "b"), ("a", "|b")])
@example([("a\\", "b"), ("a", "\\|b")])
def test_different_parts_never_give_one_series(parts: list[tuple[str, str]]) -> None:
    values = [msgspec.json.encode({"a": a, "b": b, "t": 1, "y": 1}) for a, b in parts]
    batch = decoder(series_id=["$.a", "$.b"]).decode(messages(*values))
    assert len(batch.series) == len(set(parts))


def test_key_topic_partition_and_header_name_a_series() -> None:
    d = decoder(series_id=["@key", "@topic", "@partition", "@header.site", "@field"])
    batch = d.decode(
        messages(
            b'{"t":1,"y":1}',
            keys=[b"k"],
            headers=[[("site", b"old"), ("x", b""), ("site", b"new")]],
            topic="in",
            partition=3,
        )
    )
    assert keys_of(batch) == ["k|in|3|new|y"]


@pytest.mark.parametrize(
    ("part", "keys", "headers", "reason"),
    [
        ("@key", [None], None, "mapping"),
        ("@key", [b"\xff"], None, "decode"),
        ("@header.site", [b"k"], None, "mapping"),
        ("@header.site", [b"k"], [[("other", b"x")]], "mapping"),
        ("@header.site", [b"k"], [[("site", b"\xff")]], "decode"),
    ],
)
def test_a_part_that_is_not_beside_the_message_is_a_dead_letter(
    part: str, keys: Any, headers: Any, reason: str
) -> None:
    batch = decoder(series_id=[part]).decode(messages(b'{"t":1,"y":1}', keys=keys, headers=headers))
    assert reasons(batch) == [(0, 0, reason, part)]


def test_the_same_key_on_two_partitions_is_two_series() -> None:
    value = b'{"id":"a","t":1,"y":1}'
    cut = (Range("in", 1, 10, 12), Range("in", 0, 5, 6), Range("in", 1, 12, 13), Range("other", 1, 0, 1))
    batch = decoder().decode(
        Messages(
            cut=cut,
            range_index=np.array([0, 0, 1, 2, 3], np.int32),
            offset=np.array([10, 11, 5, 12, 0]),
            broker_ns=np.full(5, 1),
            key=[None] * 5,
            value=[value] * 5,
        )
    )
    assert batch.series == (SeriesId("in", 1, "a"), SeriesId("in", 0, "a"), SeriesId("other", 1, "a"))
    assert batch.code.tolist() == [0, 0, 1, 0, 2]
    assert batch.range_index.tolist() == [0, 0, 1, 2, 3]


def test_series_stand_in_order_of_first_appearance_whatever_came_before() -> None:
    d = decoder()
    d.decode(messages(*(b'{"id":"%s","t":1,"y":1}' % name for name in (b"a", b"b", b"c"))))
    batch = d.decode(messages(*(b'{"id":"%s","t":2,"y":1}' % name for name in (b"c", b"a", b"c", b"b"))))
    assert [series.key for series in batch.series] == ["c", "a", "b"]
    assert batch.code.tolist() == [0, 1, 0, 2]


def test_names_that_are_forgotten_change_no_result() -> None:
    plan = compile_plan(decode_section(target="$.*"))
    forgetful = Decoder(JsonReader(plan), Assembler(plan, most_names=2))
    for start in (0, 3, 1, 4, 0):
        cut = messages(*(b'{"id":%d,"t":1,"x":1,"y":2}' % (start + i) for i in range(4)))
        assert facts(forgetful.decode(cut)) == facts(decoder(target="$.*").decode(cut))


def test_a_key_that_is_too_long_is_a_dead_letter_and_not_remembered() -> None:
    plan = compile_plan(
        decode_section(series_id=["$.id", "@field"], target={"xx": "$.x", "y": "$.y"}, max_key_bytes=16)
    )
    assembler = Assembler(plan)
    d = Decoder(JsonReader(plan), assembler)
    ids = ["a" * 13, "b" * 14, "c" * 15, "d" * 600_000, "é" * 7, "|" * 7]
    cut = messages(*(msgspec.json.encode({"id": i, "t": 1, "x": 1, "y": 2}) for i in ids))
    for _ in range(2):
        batch = d.decode(cut)
        assert [keys.replace("\\", "") for keys in keys_of(batch)] == [
            *(f"{ids[0]}|xx", f"{ids[0]}|y"),
            f"{ids[1]}|y",
            f"{ids[4]}|y",
            f"{ids[5]}|y",
        ]
        too_long = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (5, 0)]
        assert reasons(batch) == [(*at, "oversize", "$.id|@field") for at in too_long]
        assert max(len(r.message) for r in batch.rejected) < 50
    assert max(len(part) for parts in assembler._bases for part in parts) <= 15


def test_what_is_remembered_of_keys_is_bounded_in_bytes() -> None:
    plan = compile_plan(decode_section())
    assembler = Assembler(plan, most_bytes=1000)
    d = Decoder(JsonReader(plan), assembler)
    for i in range(30):
        assert keys_of(d.decode(messages(b'{"id":"%0200d","t":1,"y":1}' % i))) == [f"{i:0200}"]
    assert len(assembler._bases) == len(assembler._base_bytes) <= 4


@pytest.mark.parametrize(
    ("section", "value", "path"),
    [
        ({"target": "$.*"}, b'{"id":"a","t":1,%s"y":1}' % b"".join(b'"f%d":1,' % i for i in range(9)), "$.*"),
        ({"target": "@.*", "explode": "$.o"}, b'{"id":"a","t":1,"o":[%s1]}' % (b"1," * 9), "$.o"),
        ({"target": "@[0]", "explode": "$.o"}, b'{"id":"a","t":1,"o":[%s[1]]}' % (b"[1]," * 9), "$.o"),
    ],
    ids=["wildcard", "bad rows", "explode"],
)
def test_a_message_of_too_many_rows_is_one_dead_letter(section: dict[str, Any], value: bytes, path: str) -> None:
    batch = decoder(**section, max_rows=9).decode(messages(value, b"{"))
    assert len(batch.target) == 0
    assert reasons(batch)[0] == (0, 0, "oversize", path)
    assert len(batch.rejected) == 2
    whole = decoder(**section, max_rows=10).decode(messages(value))
    assert len(whole.target) + len(whole.rejected) == 10


def test_every_key_of_every_partition_and_target_is_its_own_series() -> None:
    keys = [b"a", b"b", b"c", b"d"]
    cut = tuple(Range("in", p, 0, len(keys)) for p in range(3))
    batch = decoder(target={"x": "$.x", "y": "$.y"}).decode(
        Messages(
            cut=cut,
            range_index=np.repeat(np.arange(3, dtype=np.int32), len(keys)),
            offset=np.tile(np.arange(len(keys)), 3),
            broker_ns=np.full(3 * len(keys), 1),
            key=[None] * 3 * len(keys),
            value=[b'{"id":"%s","t":1,"x":1,"y":2}' % key for key in keys] * 3,
        )
    )
    want = [SeriesId("in", p, f"{key.decode()}|{field}") for p in range(3) for key in keys for field in "xy"]
    assert [batch.series[code] for code in batch.code] == want
    assert len(batch.series) == len(want)


# Times


def test_a_record_without_a_time_gets_the_brokers() -> None:
    batch = decoder().decode(messages(b'{"id":"a","y":1}', b'{"id":"a","y":1,"t":null}', broker_ns=77))
    assert batch.time_ns.tolist() == [77, 77]


def test_without_a_brokers_time_or_by_policy_it_is_a_dead_letter() -> None:
    value = b'{"id":"a","y":1}'
    assert reasons(decoder().decode(messages(value, broker_ns=-1))) == [(0, 0, "mapping", "$.t")]
    strict = decoder(timestamp={"path": "$.t", "fallback": "none"})
    assert reasons(strict.decode(messages(value))) == [(0, 0, "mapping", "$.t")]


def test_a_brokers_time_that_is_out_of_range_is_none() -> None:
    value = b'{"id":"a","y":1}'
    assert reasons(decoder().decode(messages(value, broker_ns=2**62 + 1))) == [(0, 0, "mapping", "$.t")]


def test_without_a_time_path_the_brokers_time_is_meant() -> None:
    assert decoder(timestamp={"path": []}).decode(messages(b'{"id":"a","y":1}')).time_ns.tolist() == [BROKER_NS]


def test_several_time_paths_are_joined_by_a_space() -> None:
    d = decoder(timestamp={"path": ["$.d", "$.h"], "unit": "%d.%m.%Y %H"})
    batch = d.decode(messages(b'{"id":"a","d":"20.11.2026","h":8,"y":1}', b'{"id":"a","d":"20.11.2026","y":1}'))
    assert batch.time_ns.tolist() == [1_795_161_600 * S, BROKER_NS]
    assert reasons(d.decode(messages(b'{"id":"a","d":"20.11.2026","h":[],"y":1}'))) == [(0, 0, "schema", "$.d $.h")]


def test_a_time_without_a_zone_is_noticed() -> None:
    d = decoder(timestamp={"path": "$.t"})
    d.decode(messages(b'{"id":"a","t":"2026-11-20T08:00:00Z","y":1}'))
    assert not d.naive_times
    d.decode(messages(b'{"id":"a","t":"2026-11-20T08:00:00","y":1}'))
    assert d.naive_times


# Several targets, observations, and shapes people have


def test_several_targets_are_rows_in_the_order_listed() -> None:
    batch = decoder(target={"mem": "$.m", "cpu": "$.c"}).decode(messages(b'{"id":"a","t":1,"c":1,"m":2}'))
    assert keys_of(batch) == ["a|mem", "a|cpu"]
    assert batch.row.tolist() == [0, 1]
    assert batch.target.tolist() == [2.0, 1.0]


def test_of_several_rows_the_good_ones_stay_and_each_bad_one_is_rejected() -> None:
    d = decoder(target={"a": "$.a", "b": "$.b", "c": "$.c"})
    batch = d.decode(messages(b'{"id":"s","t":1,"a":1,"b":true,"c":3}', b'{"id":"s","a":1,"b":2,"c":3,"t":"x"}'))
    assert batch.row.tolist() == [0, 2]
    assert reasons(batch) == [
        (0, 1, "schema", "$.b"),
        (1, 0, "schema", "$.t"),
        (1, 1, "schema", "$.t"),
        (1, 2, "schema", "$.t"),
    ]


def test_telegraf_has_many_fields_in_one_message() -> None:
    value = b'{"name":"cpu","tags":{"host":"h1"},"fields":{"user":1.5,"idle":98,"state":"ok"},"timestamp":1700000000}'
    d = decoder(series_id=["$.tags.host", "$.name"], timestamp={"path": "$.timestamp"}, target="$.fields.*")
    batch = d.decode(messages(value))
    assert keys_of(batch) == ["h1|cpu|user", "h1|cpu|idle"]
    assert batch.time_ns.tolist() == [1_700_000_000 * S] * 2


def test_telegraf_batches_are_exploded() -> None:
    value = b"""{"metrics":[
        {"name":"cpu","tags":{"host":"h1"},"fields":{"user":1},"timestamp":1700000000},
        {"name":"mem","tags":{"host":"h1"},"fields":{"used":2,"free":3},"timestamp":1700000000}]}"""
    d = decoder(
        explode="$.metrics", series_id=["@.tags.host", "@.name"], timestamp={"path": "@.timestamp"}, target="@.fields.*"
    )
    batch = d.decode(messages(value))
    assert keys_of(batch) == ["h1|cpu|user", "h1|mem|used", "h1|mem|free"]
    assert batch.row.tolist() == [0, 1, 2]


def test_the_prometheus_adapter_quotes_its_values() -> None:
    d = decoder(series_id=["$.labels.instance", "$.name"], timestamp={"path": "$.timestamp"}, target="$.value")
    shape = '{"timestamp":"2026-11-20T08:00:00Z","value":"%s","name":"up","labels":{"instance":"h:1"}}'
    batch = d.decode(messages(*((shape % v).encode() for v in ("98765", "NaN", "+Inf"))))
    assert batch.target[0] == 98765.0
    assert math.isnan(batch.target[1])
    assert reasons(batch) == [(2, 0, "non_finite", "$.value")]
    assert set(batch.time_ns.tolist()) == {BROKER_NS}


def test_a_devices_readings_are_exploded_beside_what_they_share() -> None:
    d = decoder(
        explode="$.readings",
        series_id=["$.device", "@field"],
        timestamp={"path": "@.ts", "unit": "ms"},
        target={"t": "@.temp", "h": "@.hum"},
    )
    batch = d.decode(messages(b'{"device":"d","readings":[{"ts":1,"temp":20,"hum":50},{"ts":2,"temp":21}]}'))
    assert keys_of(batch) == ["d|t", "d|h", "d|t", "d|h"]
    assert batch.row.tolist() == [0, 1, 2, 3]
    assert batch.time_ns.tolist() == [10**6, 10**6, 2 * 10**6, 2 * 10**6]
    assert batch.target[:3].tolist() == [20.0, 50.0, 21.0]
    assert math.isnan(batch.target[3])


def test_pairs_in_arrays_are_observations_too() -> None:
    d = decoder(explode="$.points", target="@[1]", timestamp={"path": "@[0]"})
    batch = d.decode(messages(b'{"id":"a","points":[[1700000000,5],[1700000010,6]]}'))
    assert batch.target.tolist() == [5.0, 6.0]


def test_a_wildcard_takes_every_number_but_the_time_and_the_name() -> None:
    batch = decoder(target="$.*").decode(
        messages(b'{"id":7,"t":1,"b":2,"a":1.5,"s":"text","q":"3","o":{},"f":true,"n":null}')
    )
    assert keys_of(batch) == ["7|b", "7|a", "7|n"]
    assert batch.row.tolist() == [0, 1, 2]
    assert math.isnan(batch.target[2])


def test_a_wildcards_bad_number_is_named() -> None:
    batch = decoder(target="$.*").decode(messages(b'{"id":"x","t":1,"a":1,"b":1e40,"c":3}'))
    assert batch.row.tolist() == [0, 2]
    assert reasons(batch) == [(0, 1, "non_finite", "$.b")]
    long = decoder(target="$.*").decode(messages(b'{"id":"x","t":1,"%s":1e40}' % (b"n" * 999)))
    assert len(long.rejected[0].path) == 200


@pytest.mark.parametrize(
    ("keys", "value", "reason", "path"),
    [
        ({"explode": "$.o", "target": "@.y"}, b'{"id":"a","t":1,"o":[]}', "mapping", "$.o"),
        ({"explode": "$.o", "target": "@.y"}, b'{"id":"a","t":1}', "mapping", "$.o"),
        ({"explode": "$.o", "target": "@.y"}, b'{"id":"a","t":1,"o":{}}', "schema", "$.o"),
        ({"explode": "$.o.p", "target": "@.y"}, b'{"id":"a","t":1,"o":1}', "schema", "$.o.p"),
        ({"explode": "$.o", "target": "@.y"}, b'{"id":"a","t":1,"o":[3]}', "schema", "@.y"),
        ({"target": "$.*"}, b'{"id":"a","t":1,"s":"x"}', "mapping", "$.*"),
        ({"target": "$.m.*"}, b'{"id":"a","t":1,"m":null}', "mapping", "$.m.*"),
        ({"target": "$.m.*"}, b'{"id":"a","t":1,"m":3}', "schema", "$.m"),
    ],
)
def test_a_message_that_gives_no_row_is_one_rejected_record(
    keys: dict[str, Any], value: bytes, reason: str, path: str
) -> None:
    batch = decoder(**keys).decode(messages(value))
    assert len(batch) == 0
    assert reasons(batch) == [(0, 0, reason, path)]


def test_an_observation_that_is_no_object_takes_its_row() -> None:
    d = decoder(explode="$.o", target="@.*", timestamp={"path": "@.t", "unit": "s"})
    batch = d.decode(messages(b'{"id":"a","o":[{"t":1,"y":1},5,{"t":2,"y":2}]}'))
    assert batch.row.tolist() == [0, 2]
    assert reasons(batch) == [(0, 1, "schema", "@")]


# Laws


def test_depth_counts_brackets_outside_text_only() -> None:
    assert depth(b'{"a":"[[[[\\"[[[","b":[1]}') == 2
    assert depth(b'{"a":"\\\\","b":[[1]]}') == 3
    assert depth(b"") == 0


def test_how_deep_a_message_may_be_does_not_depend_on_the_callers_stack() -> None:
    def message(levels: int) -> bytes:
        return b'{"id":"a","t":1,"y":1,"z":%s%s}' % (b"[" * (levels - 1), b"]" * (levels - 1))

    def outcome(frames: int) -> tuple[int, int]:
        if frames:
            return outcome(frames - 1)
        batch = decoder().decode(messages(message(DEEPEST), message(DEEPEST + 1)))
        return len(batch), len(batch.rejected)

    assert outcome(0) == (1, 1)
    assert outcome(sys.getrecursionlimit() // 3) == (1, 1)


document = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["1.5", "NaN"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["id", "t", "y", "o", "m", "x"]), inner, max_size=6),
    ),
    max_leaves=12,
)
observation = st.fixed_dictionaries(
    {},
    optional={
        "id": st.one_of(st.text(max_size=3), st.integers(), document),
        "t": st.one_of(st.integers(0, 4 * 10**9), st.floats(0, 4e9), st.just("2026-11-20T08:00:00Z"), document),
        "y": st.one_of(st.floats(), st.integers(), document),
        "m": document,
        "o": st.lists(document, max_size=3),
    },
)
payload = st.one_of(
    st.none(),
    st.binary(max_size=30),
    st.one_of(document, observation).map(msgspec.json.encode),
    observation.map(lambda o: msgspec.json.encode({**o, "o": [o, o]})),
    st.sampled_from(
        [
            b'{"id":"a","t":1,"y":NaN}', b'{"id":"a","t":1,"y":1e400}', b'{"id":"\\ud800","t":1,"y":1}',
            b"[" * 5000, b'{"a":' * 3000, b'{"id":"a","t":1,"y":' + b"9" * 6000 + b"}", b"\xef\xbb\xbf{}",
            b'{"id":"a","id":{},"t":1,"y":1}',
        ]
    ),
)  # fmt: skip
sections: list[dict[str, Any]] = [
    {},
    {"timestamp": {"path": "$.t"}, "target": {"a": "$.y", "b": "$.m.y"}},
    {"target": "$.*"},
    {"target": "$.m.*", "series_id": ["$.id", "@field", "@partition"]},
    {"explode": "$.o", "target": "@.y", "series_id": ["$.id", "@.id"], "timestamp": {"path": "@.t"}},
    {"explode": "$.o", "target": "@.*", "timestamp": {"path": ["@.t", "$.t"], "unit": "%Y %H", "fallback": "none"}},
    {"target": "$.o[0].y", "series_id": ["@key"]},
    {"target": "$.y", "series_id": ["$.y", "$.t"], "timestamp": {"path": "$.y"}},
    {"target": {"a": "$.m", "b": "$.m.x"}},
]
decoders = [decoder(max_bytes=20_000, **section) for section in sections]


def facts(batch: RecordBatch) -> tuple[list[Any], list[Any]]:
    """What a cut says, apart from how it numbers its series."""
    columns = [batch.offset, batch.row, batch.time_ns, np.nan_to_num(batch.target, nan=1e99)]
    return list(zip(keys_of(batch), *(c.tolist() for c in columns), strict=True)), list(batch.rejected)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(decoders), st.lists(payload, min_size=1, max_size=5))
def test_any_bytes_become_records_or_rejections(d: Any, values: list[bytes | None]) -> None:
    batch = d.decode(messages(*values))
    assert len(batch.series) == len(set(batch.series)) == len(set(batch.code.tolist()))
    assert list(dict.fromkeys(batch.code.tolist())) == list(range(len(batch.series)))
    assert all(series.key.encode() is not None for series in batch.series)
    with np.errstate(over="ignore"):
        assert not np.isinf(batch.target.astype(np.float32)).any()
    assert (np.abs(batch.time_ns) <= 2**62).all()
    assert all(r.reason in REASONS and r.message for r in batch.rejected)
    assert list(batch.rejected) == sorted(batch.rejected, key=lambda r: (r.offset, r.row))
    rows = [*zip(batch.offset.tolist(), batch.row.tolist(), strict=True)]
    assert rows == sorted(rows)
    everything = sorted(rows + [(r.offset, r.row) for r in batch.rejected])
    assert len(set(everything)) == len(everything)
    tombstones = {offset for offset, value in enumerate(values) if value is None}
    assert batch.skipped == len(tombstones)
    assert {offset for offset, _ in everything} == set(range(len(values))) - tombstones
    for offset in range(len(values)):
        of_one = [row for at, row in everything if at == offset]
        assert of_one == list(range(len(of_one)))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(sections) - 1), st.lists(payload, min_size=2, max_size=5))
def test_what_a_message_becomes_depends_on_it_alone(which: int, values: list[bytes | None]) -> None:
    together = facts(decoders[which].decode(messages(*values)))
    fresh = decoder(max_bytes=20_000, **sections[which])
    apart = [facts(fresh.decode(messages(value, start=i))) for i, value in enumerate(values)]
    assert together == ([x for good, _ in apart for x in good], [x for _, bad in apart for x in bad])


@settings(max_examples=200, deadline=None)
@given(st.lists(payload, min_size=1, max_size=4))
def test_the_struct_type_changes_nothing_but_the_speed(values: list[bytes | None]) -> None:
    section = {"timestamp": {"path": "$.t"}, "target": {"a": "$.y", "b": "$.m.y"}}
    typed, untyped = decoder(max_bytes=20_000, **section), decoder(max_bytes=20_000, **section)
    untyped._reader._typed = None
    assert facts(typed.decode(messages(*values))) == facts(untyped.decode(messages(*values)))
