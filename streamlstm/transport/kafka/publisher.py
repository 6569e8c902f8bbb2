"""
The checked commit.

kafka-python 3.0.12 can report a lost transaction as committed: ``begin → send → commit_transaction()`` returns
normally while every send has failed. So nothing is believed here but the result of each send. And its ``commit``,
``abort`` and ``init`` wait without limit for a broker that is gone, so each runs against the
:class:`~streamlstm.transport.deadline.Deadline`.
"""

from kafka import errors as kafka_errors

from streamlstm.config.model import Config
from streamlstm.errors import StreamlstmError, Temporary
from streamlstm.transport.deadline import Deadline
from streamlstm.transport.interfaces import Outputs
from streamlstm.transport.kafka.clients import Producer, close_producer, open_checked_producer
from streamlstm.transport.kafka.explain import explain
from streamlstm.transport.kafka.sending import Partitioner, Sending, to_start_over
from streamlstm.transport.kafka.settings import SHARD, transaction_settings


class KafkaPublisher:
    """
    A :class:`~streamlstm.transport.interfaces.Publisher`, by transactions under the name ``<config.name>-<shard>``.

    Not for several threads. After any error it refuses to go on: the state of a transaction that failed is not known
    here, and mending it in place is how results are lost. Begin a new session, or better a new process.
    """

    def __init__(self, config: Config, deadline: Deadline) -> None:
        self._config = config
        self._deadline = deadline
        self._producer: Producer = None
        self._partitions = Partitioner()

    def begin_session(self) -> None:
        """
        See :class:`~streamlstm.transport.interfaces.Publisher`.

        When this returns, a transaction that somebody else had open under this name is aborted, one that was being
        committed is committed, and nobody else can commit any more.
        """
        self.close()
        with self._deadline.guard("taking over the transactional id"):
            producer = open_checked_producer(transaction_settings(self._config))
            try:
                producer.init_transactions()
            except kafka_errors.KafkaError as error:
                close_producer(producer)
                raise explain(error, "taking over the transactional id") from error
        self._producer = producer

    def commit(self, outputs: Outputs) -> int:
        """
        See :class:`~streamlstm.transport.interfaces.Publisher`. The order is the whole point:

        1. begin;
        2. send forecasts, dead letters, and last the progress record;
        3. flush, whose own result says nothing either way;
        4. take the result of *every* send: one that failed, or is not known, ends it here;
        5. only then commit.
        """
        if self._producer is None:
            raise Temporary("nothing can be published before a session has begun, or after one has failed")
        with self._deadline.guard("committing a transaction"):
            try:
                return self._commit(outputs)
            except Exception as error:
                self.close()
                if isinstance(error, kafka_errors.KafkaError | StreamlstmError):
                    raise to_start_over(explain(error, "committing a transaction")) from error
                raise

    def close(self) -> None:
        """See :class:`~streamlstm.transport.interfaces.Publisher`. A transaction that is open is left to be aborted."""
        producer, self._producer = self._producer, None
        if producer is not None:
            close_producer(producer)

    def _commit(self, outputs: Outputs) -> int:
        self._producer.begin_transaction()
        sending = Sending(self._producer, self._partitions, self._deadline.limit_s)
        sending.send(self._config.forecast_topic, outputs.forecasts)
        sending.send(self._config.dead_letter_topic, outputs.dead_letters)
        sending.send_value(self._config.progress_topic, outputs.progress, SHARD)
        offset = sending.settle()
        assert offset is not None
        self._producer.commit_transaction()
        return offset
