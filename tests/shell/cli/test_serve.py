"""The composition root of the service."""

import pytest

from streamlstm.cli import serve
from streamlstm.config.model import Config
from streamlstm.errors import NotAuthorised, Unavailable
from streamlstm.transport.kafka.preflight import HungUpOn

CONFIG = Config.model_validate({
    "source": {"bootstrap_servers": ["127.0.0.1:1"], "topics": ["in"]},
    "decode": {"series_id": ["$.id"], "timestamp": {"path": "$.t"}, "target": "$.y"},
})  # fmt: skip


@pytest.mark.parametrize("error", [HungUpOn("closed after TLS"), Unavailable("away")])
def test_a_broker_that_only_hangs_up_has_refused_nobody(monkeypatch, error):
    """A restart is tried for that, and for a refusal it is not."""

    def found(*_, **__):
        raise error

    monkeypatch.setattr(serve, "preflight", found)
    serve._refuse_without_credentials(CONFIG)


def test_a_broker_that_says_so_refuses_us(monkeypatch):
    def found(*_, **__):
        raise NotAuthorised("wrong password")

    monkeypatch.setattr(serve, "preflight", found)
    with pytest.raises(NotAuthorised, match="wrong password"):
        serve._refuse_without_credentials(CONFIG)


def test_what_could_not_be_counted_fails_no_start(monkeypatch, tmp_path):
    def found(*_):
        raise Unavailable("away")

    monkeypatch.setattr(serve, "count_held", found)
    serve._warn_of_another_life(CONFIG, None, None)
