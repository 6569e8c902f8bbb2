"""Group offsets for lag tools: written by nobody's need, read by nobody here."""

import logging
import threading
from collections.abc import Sequence

from kafka import errors as kafka_errors
from kafka.structs import OffsetAndMetadata, TopicPartition

from streamlstm.config.model import Config
from streamlstm.transport.interfaces import Position
from streamlstm.transport.kafka.clients import CLOSE_TIMEOUT_S, Admin, admin

EVERY_S = 5.0
_RETRY_S = 0.5
_TELL_AFTER = 4  # the first commit of a cluster's life finds no coordinator for a while

_log = logging.getLogger(__name__)


class GroupOffsets:
    """
    Commits the newest positions offered to it, every so often, from a thread of its own.

    The consumer that reads has no group: with one, a coordinator that is away or not authorised would hold up its
    polls. Failing again and again is told once, at warning, and not again before a success.
    """

    def __init__(self, config: Config, every_s: float = EVERY_S) -> None:
        self._config = config
        self._every_s = every_s
        self._newest: Sequence[Position] = ()
        self._committed: Sequence[Position] = ()
        self._offered = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._failures = 0

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
        while not (self._closing.is_set() and (self._failures or self._newest is self._committed)):
            try:
                with admin(self._config.source) as client:
                    self._commit_while_well(client)
            except Exception as error:  # noqa: BLE001, because what nobody thought of must not end the thread for good
                self._failures += 1
                level = logging.WARNING if self._failures == _TELL_AFTER else logging.DEBUG
                _log.log(level, "group %s: offsets for lag tools not committed: %s", self._config.name, error)
                self._closing.wait(min(self._every_s, _RETRY_S * self._failures))

    def _commit_while_well(self, client: Admin) -> None:
        while True:
            positions = self._newest
            if positions is not self._committed:
                self._commit(client, positions)
                self._committed, self._failures = positions, 0
            if self._closing.is_set() and self._newest is positions:
                return
            self._closing.wait(self._every_s)
            self._offered.wait()
            self._offered.clear()

    def _commit(self, client: Admin, positions: Sequence[Position]) -> None:
        offsets = {TopicPartition(p.topic, p.partition): OffsetAndMetadata(p.next_offset, "", -1) for p in positions}
        for kind in client.alter_group_offsets(self._config.name, offsets).values():
            if kind is not kafka_errors.NoError:
                raise kind(self._config.name)
