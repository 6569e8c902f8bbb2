"""
Logs: structlog to stderr, for a person on a terminal, as JSON lines for a machine.

What other libraries log (kafka) goes the same way. A line is one event: control characters in values are escaped, so
that no key or error text from outside can forge a line or colour a terminal. Tracebacks never show local variables,
which may hold payload or secrets.
"""

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

REPEAT_S = 30.0
"""How long the Kafka client's repetitions are left out."""

_REMEMBERED = 1000

_CONTROL = {c: f"\\x{c:02x}" for c in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x0A: "\\n",
    0x0D: "\\r",
    0x09: "\\t",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}


def configure_logging(
    level: Literal["debug", "info", "warning", "error"],
    format: Literal["auto", "console", "json"] = "auto",  # noqa: A002, because it is named after its key in the config
    stream: TextIO | None = None,
) -> None:
    """
    Send everything to ``stream`` (stderr), from this level on.

    ``auto`` is ``console`` on a terminal. ``NO_COLOR`` is obeyed. The Kafka client is heard from ``warning`` on, even
    at ``debug``: below that it logs keys, values and passwords. What it repeats several times a second while a broker
    is away is said once in :data:`REPEAT_S`.
    """
    out: TextIO = sys.stderr if stream is None else stream
    console = format == "console" or (format == "auto" and out.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.UnicodeDecoder(),
    ]
    final: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if console:
        colours = out.isatty() and not os.environ.get("NO_COLOR")
        final += [
            _escape,
            structlog.dev.ConsoleRenderer(colors=colours, exception_formatter=structlog.dev.plain_traceback),
        ]
    else:
        final += [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(sort_keys=True),
        ]
    handler = _ToStderr() if stream is None else logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name], processors=final
        )
    )
    handler.addFilter(_Sparing("kafka"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # It complains of every call that takes long, and start-up is made of them.
    logging.getLogger("kafka.net.selector").setLevel(logging.ERROR)
    logging.getLogger("kafka").setLevel(logging.WARNING)
    # What it calls a fatal error is raised, too, and told by us; a session that we end ourselves is one to it.
    logging.getLogger("kafka.producer.transaction_manager").setLevel(logging.CRITICAL)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_logger_name,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


class _Sparing(logging.Filter):
    """
    Lets a library say each thing once in :data:`REPEAT_S`; the next time it says how often it was left out.

    Things are told apart by logger and message template, not by arguments: those hold ports and counters.
    """

    def __init__(self, library: str) -> None:
        super().__init__()
        self._library = library
        self._said: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] != self._library:
            return True
        what = (record.name, str(record.msg))
        since_s, left_out = self._said.get(what, (float("-inf"), 0))
        if record.created - since_s < REPEAT_S:
            self._said[what] = (since_s, left_out + 1)
            return False
        if len(self._said) >= _REMEMBERED:
            self._said.clear()
        self._said[what] = (record.created, 0)
        if left_out:
            record.__dict__["repeated"] = left_out
        return True


class _ToStderr(logging.StreamHandler[TextIO]):
    """Writes to what ``sys.stderr`` is at that time, not to what it was."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _escape(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Control characters of every text value, visible. Tracebacks keep their lines."""
    return {
        name: value if name in ("exc_info", "exception", "stack") else _visible(value) for name, value in event.items()
    }


def _visible(value: object) -> object:
    if isinstance(value, str):
        return value.translate(_CONTROL)
    return value if value is None or isinstance(value, bool | int | float) else repr(value).translate(_CONTROL)
