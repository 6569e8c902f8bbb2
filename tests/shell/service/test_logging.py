import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from streamlstm.service.logging import configure_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.getLogger("kafka").setLevel(logging.NOTSET)
    structlog.reset_defaults()


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_machine_gets_one_json_object_a_line() -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream)
    structlog.get_logger("streamlstm.x").info("went live", step=7)
    (line,) = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "went live", "step": 7, "level": "info", "logger": "streamlstm.x"}


def test_other_libraries_go_the_same_way() -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream)
    logging.getLogger("kafka.conn").warning("lost %s", "b-1")
    logging.getLogger("kafka.conn").info("chatter")
    assert [(x["event"], x["level"], x["logger"]) for x in lines(stream)] == [("lost b-1", "warning", "kafka.conn")]


def test_below_the_level_nothing_is_said() -> None:
    stream = io.StringIO()
    configure_logging("warning", stream=stream)
    structlog.get_logger().info("no")
    structlog.get_logger().warning("yes")
    assert [x["event"] for x in lines(stream)] == ["yes"]


@pytest.mark.parametrize("shape", ["json", "console"])
def test_text_from_outside_cannot_forge_a_line(shape: str) -> None:
    stream = io.StringIO()
    configure_logging("info", shape, stream=stream)
    forged = "x\n2026-11-20 [error] owned\r\x1b[31m\x85\u2028red"
    structlog.get_logger().warning("bad key", key=forged, nested={"a": forged})
    structlog.get_logger().warning(forged)
    logging.getLogger("kafka").warning("%s", forged)
    text = stream.getvalue()
    assert len(text.splitlines()) == 3
    assert "\x1b" not in text


def test_a_traceback_shows_no_local_variables() -> None:
    for shape, stream in (("json", io.StringIO()), ("console", Terminal())):
        configure_logging("info", shape, stream=stream)
        secret = "hunter" + "2"
        try:
            int(f"no number{len(secret)}")
        except ValueError:
            structlog.get_logger().exception("failed")
        assert "ValueError: invalid" in stream.getvalue()
        assert "hunter2" not in stream.getvalue()


def test_a_terminal_gets_colours_unless_it_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = Terminal()
    configure_logging("info", stream=coloured)
    structlog.get_logger().info("hello")
    assert "\x1b[" in coloured.getvalue()

    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    configure_logging("info", stream=plain)
    structlog.get_logger().info("hello")
    assert "\x1b[" not in plain.getvalue()
    assert "hello" in plain.getvalue()


def test_what_the_kafka_client_repeats_is_said_once_and_counted() -> None:
    stream = io.StringIO()
    configure_logging("info", stream=stream)
    logger = logging.getLogger("kafka.net.manager")
    handler = logging.getLogger().handlers[0]
    for at_s, port in [(0.0, 1), (0.1, 2), (29.0, 3), (31.0, 4), (32.0, 5)]:
        record = logger.makeRecord(logger.name, logging.ERROR, "f", 1, "Connection %d failed", (port,), None)
        record.created = at_s
        handler.handle(record)
    structlog.get_logger("streamlstm").info("ours")
    structlog.get_logger("streamlstm").info("ours")
    said = [(x["event"], x.get("repeated")) for x in lines(stream)]
    assert said == [("Connection 1 failed", None), ("Connection 4 failed", 2), ("ours", None), ("ours", None)]
