"""Group offsets for lag tools: written by nobody's need, read by nobody here."""

import logging
import threading
from collections.abc import Sequence

from kafka import errors as kafka_errors
from kafka.structs import OffsetAndMetadata, TopicPartition

from streamlstm.config.model import Config
from streamlstm.errors import StreamlstmError
from streamlstm.transport.interfaces import Position
from streamlstm.transport.kafka.clients import CLOSE_TIMEOUT_S, Admin, admin

EVERY_S = 5.0

_log = logging.getLogger(__name__)


class GroupOffsets:
    """
    Commits the newest positions offered to it, every so often, from a thread of its own.

    The consumer that reads has no group: with one, a coordinator that is away or not authorised would hold up its
    polls. Failures are told once, at warning, and again only after a success.
    """

    def __init__(self, config: Config, every_s: float = EVERY_S) -> None:
        self._config = config
        self._every_s = every_s
        self._newest: Sequence[Position] | None = None
        self._offered = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._complained = False

    def offer(self, positions: Sequence[Position]) -> None:
        """Commit these, soon, unless newer ones come first. Never blocks, never raises."""
        self._newest = positions
        self._offered.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="group offsets", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Commit what was offered last, if that goes quickly."""
        self._closing.set()
        self._offered.set()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                with admin(self._config.source) as client:
                    self._commit_until_closed(client)
            except (StreamlstmError, kafka_errors.KafkaError, OSError) as error:
                level = logging.DEBUG if self._complained else logging.WARNING
                _log.log(level, "group %s: offsets for lag tools not committed: %s", self._config.name, error)
                self._complained = True
                self._closing.wait(self._every_s)

    def _commit_until_closed(self, client: Admin) -> None:
        while True:
            self._offered.wait()
            self._offered.clear()
            positions, self._newest = self._newest, None
            if positions is not None:
                self._commit(client, positions)
            if self._closing.is_set() and self._newest is None:
                return
            self._closing.wait(self._every_s)

    def _commit(self, client: Admin, positions: Sequence[Position]) -> None:
        offsets = {
            TopicPartition(p.topic, p.partition): OffsetAndMetadata(p.next_offset, "", -1) for p in positions
        }  # fmt: skip
        results = client.alter_group_offsets(self._config.name, offsets)
        for kind in results.values():
            if kind is not kafka_errors.NoError:
                raise kind(self._config.name)
        self._complained = False
