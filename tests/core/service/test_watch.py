import inspect

import pytest

from streamlstm.config.model import Config
from streamlstm.service.observer import Observer, Observers
from streamlstm.service.watch import watch

VERBS = [name for name in vars(Observer) if name.startswith("observe_")]


class Notebook:
    def __init__(self) -> None:
        self.told: list[tuple] = []

    def __getattr__(self, verb: str):
        return lambda *facts: self.told.append((verb, *facts))


@pytest.mark.parametrize("verb", VERBS)
def test_several_observers_are_all_told_the_same(verb: str) -> None:
    books = [Notebook(), Notebook()]
    facts = [object() for _ in inspect.signature(getattr(Observer, verb)).parameters][1:]
    getattr(Observers(*books), verb)(*facts)
    assert [book.told for book in books] == [[(verb, *facts)]] * 2


def test_a_configuration_gives_status_and_metrics_that_agree() -> None:
    config = Config.model_validate(
        {
            "name": "nine",
            "source": {"topics": ["in"]},
            "decode": {"series_id": ["$.name"], "timestamp": {"path": "$.time"}, "target": "$.value"},
            "sink": {"forecasts": {"topic": "out"}},
            "model": {"horizons": 2},
        }
    )
    seen = watch(config, "0123456789abcdef", "cpu")
    seen.observer.observe_phase("running")
    assert seen.status.snapshot()["name"] == "nine"
    assert seen.status.unready() is None
    body, _ = seen.metrics.render("")
    assert b"streamlstm_ready 1.0" in body
    assert b'streamlstm_learning_rate{model="lstm"} 0.001' in body
