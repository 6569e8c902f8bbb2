"""What ``sink.delivery`` stands for: who publishes, where progress is kept, and what a start repeats."""

from dataclasses import dataclass
from pathlib import Path

from streamlstm.config.model import Config
from streamlstm.recovery.journal import DIRECTORY, Journal
from streamlstm.recovery.repetition import Repeat
from streamlstm.service.encode import ForecastEncoder
from streamlstm.service.repeat import Repeater
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import ProgressLog, Publisher
from streamlstm.transport.kafka.idempotent import IdempotentPublisher
from streamlstm.transport.kafka.progress import KafkaProgressLog
from streamlstm.transport.kafka.publisher import KafkaPublisher


@dataclass(frozen=True, slots=True)
class Delivery:
    """``repeat`` is ``None`` where a commit is all or nothing."""

    publisher: Publisher
    progress: ProgressLog
    repeat: Repeat | None


def open_delivery(config: Config, deadline: Deadline) -> Delivery:
    """For the process that owns the deployment. Nothing is touched before the publisher's session begins."""
    if config.sink.delivery == "exactly_once":
        return Delivery(KafkaPublisher(config, deadline), KafkaProgressLog(config, deadline), None)
    journal = _journal(config)
    publisher = IdempotentPublisher(config, journal, deadline)
    repeat = Repeater(publisher, lambda hashed, revision: ForecastEncoder(hashed, config.model.horizons, revision))
    return Delivery(publisher, journal, repeat)


def progress_log(config: Config, deadline: Deadline) -> ProgressLog:
    """The deployment's chain, to be read; also while the service runs."""
    return KafkaProgressLog(config, deadline) if config.sink.delivery == "exactly_once" else _journal(config)


def _journal(config: Config) -> Journal:
    return Journal(Path(config.checkpoint.url) / DIRECTORY)
