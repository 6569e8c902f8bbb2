import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from streamlstm.config.keys import (
    KEYS,
    changed,
    config_hash,
    identity_values,
    learning_values,
    values,
    with_learning,
)
from streamlstm.config.model import Config, Duration, format_duration
from streamlstm.errors import ConfigError


def made(**sections):
    plain = {
        "source": {"topics": ["metrics.raw"]},
        "decode": {"series_id": ["$.host"], "timestamp": {"path": "$.ts"}, "target": "$.value"},
    }
    for section, keys in sections.items():
        plain[section] = {**plain.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return Config.model_validate(plain)


def test_every_key_has_a_class_a_meaning_and_a_kind():
    for key in KEYS.values():
        assert key.klass in ("identity", "learning", "free")
        assert len(key.meaning) > 5, key.path
        assert key.kind


def test_every_required_key_has_an_example_that_is_right():
    assert values(made())["decode.target"] == "$.value"
    for key in KEYS.values():
        assert not key.field.is_required() or key.field.examples, key.path


def test_free_keys_do_not_enter_a_hash():
    free = made(checkpoint={"url": "./other"}, http={"listen": "0.0.0.0:1"}, source={"bootstrap_servers": ["b:1"]})
    assert config_hash(free) == config_hash(made())


@pytest.mark.parametrize(
    ("sections", "identity", "learning"),
    [
        ({"model": {"hidden_size": 32}}, ["model.hidden_size"], []),
        ({"training": {"k1": 8, "max_wait": 10}}, [], ["training.k1", "training.max_wait"]),
        ({"decode": {"on_error": "skip"}}, ["decode.on_error"], []),
        ({"sink": {"commit_every": "1s"}}, [], []),
        (
            {"name": "other"},
            ["name", "sink.dead_letters.topic", "sink.forecasts.topic", "sink.progress.topic"],
            [],
        ),
    ],
)
def test_what_changed_is_named_by_class(sections, identity, learning):
    old, new = made(), made(**sections)
    assert changed(identity_values(old), identity_values(new)) == identity
    assert changed(learning_values(old), learning_values(new)) == learning
    assert (identity_values(old) == identity_values(new)) == (not identity)
    assert (learning_values(old) == learning_values(new)) == (not learning)


def test_saying_a_default_is_no_change():
    said = made(
        training={"k2": 48, "optimizer": {"lr": 0.001}},
        series={"max_ahead": "24h"},
        sink={"dead_letters": {"topic": "forecasts.dlq"}},
    )
    assert config_hash(said) == config_hash(made())


def test_a_key_that_only_one_side_has_is_a_change():
    assert changed({"a": 1}, {"a": 1, "b": None}) == ["b"]


@given(st.integers(1, 10**12) | st.sampled_from([1000, 60_000, 3_600_000, 86_400_000]))
def test_a_duration_is_written_as_it_is_read(microseconds):
    seconds = microseconds / 1e6
    if seconds <= 3650 * 86_400:
        assert TypeAdapter(Duration).validate_python(format_duration(seconds)) == pytest.approx(seconds, rel=1e-15)


def test_a_configuration_may_be_put_under_other_learning_values():
    config = made()
    other = with_learning(config, {"training.k1": 3, "training.k2": 40, "training.optimizer.lr": 0.5, "gone.key": 1})

    assert (other.training.k1, other.k2, other.learning_rate) == (3, 40, 0.5)
    assert identity_values(other) == identity_values(config)
    assert with_learning(config, learning_values(config)) is config
    assert learning_values(with_learning(other, learning_values(config))) == learning_values(config)


def test_learning_values_of_another_time_raise_max_series_where_they_need_it():
    config = made(series={"max_series": 5}, training={"max_wait": 5})

    then = with_learning(config, {"training.max_wait": 12})

    assert (then.training.max_wait, then.series.max_series) == (12, 12)
    assert with_learning(then, {"training.max_wait": 5}).series.max_series == 12


def test_learning_values_that_do_not_go_with_the_rest_are_refused_in_one_line():
    with pytest.raises(
        ConfigError, match=r"do not go with the configuration: .*training\.k2: write at least"
    ) as refused:
        with_learning(made(), {"training.k1": 3, "training.k2": 1})
    assert "\n" not in str(refused.value)
    assert "pydantic" not in str(refused.value)
