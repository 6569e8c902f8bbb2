"""Publishing without transactions: what is to be published is durable on this machine before anything of it is out."""

from collections.abc import Sequence

from kafka import errors as kafka_errors

from streamlstm.config.model import Config
from streamlstm.errors import StreamlstmError, Temporary
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import DurableLog, OutMessage, Outputs
from streamlstm.transport.kafka.clients import Producer, close_producer, open_checked_producer
from streamlstm.transport.kafka.explain import explain
from streamlstm.transport.kafka.sending import Partitioner, Sending, to_start_over
from streamlstm.transport.kafka.settings import producer_settings


class IdempotentPublisher:
    """
    A :class:`~streamlstm.transport.interfaces.Publisher` that keeps progress in a log of this machine.

    Each message is published at least once. When :meth:`commit` has returned all of them are out; after a kill or an
    error some of the newest record's may be missing, and only those: the next start publishes that record's again
    (:meth:`publish`). Nobody is fenced: whoever holds the log's directory is the only one.

    Not for several threads. After any error it refuses to go on, for some messages may be out and others not.
    """

    def __init__(self, config: Config, log: DurableLog, deadline: Deadline) -> None:
        self._config, self._log, self._deadline = config, log, deadline
        self._producer: Producer = None
        self._partitions = Partitioner()

    def begin_session(self) -> None:
        """Go on at the end of the log, and reach the broker."""
        self.close()
        with self._deadline.guard("opening the journal"):
            self._log.open()
        with self._deadline.guard("connecting to publish"):
            self._producer = open_checked_producer(producer_settings(self._config))

    def commit(self, outputs: Outputs) -> int:
        """
        See :class:`~streamlstm.transport.interfaces.Publisher`. The order is the whole point:

        1. make the progress record durable;
        2. send forecasts and dead letters;
        3. take the result of every send: only then may the next record be written, which says that they are out.
        """
        self._check_session()
        with self._deadline.guard("writing the journal"):
            try:
                offset = self._log.append(outputs.progress)
            except BaseException:
                self.close()
                raise
        self.publish(outputs.forecasts, outputs.dead_letters)
        return offset

    def publish(self, forecasts: Sequence[OutMessage], dead_letters: Sequence[OutMessage]) -> None:
        """What a record that is durable already has promised. Raises as :meth:`commit` does."""
        self._check_session()
        with self._deadline.guard("publishing"):
            try:
                sending = Sending(self._producer, self._partitions, self._deadline.limit_s)
                sending.send(self._config.forecast_topic, forecasts)
                sending.send(self._config.dead_letter_topic, dead_letters)
                sending.settle()
            except Exception as error:
                self.close()
                if isinstance(error, kafka_errors.KafkaError | StreamlstmError):
                    raise to_start_over(explain(error, "publishing")) from error
                raise

    def close(self) -> None:
        """See :class:`~streamlstm.transport.interfaces.Publisher`."""
        self._log.close()
        producer, self._producer = self._producer, None
        if producer is not None:
            close_producer(producer)

    def _check_session(self) -> None:
        if self._producer is None:
            raise Temporary("nothing can be published before a session has begun, or after one has failed")
