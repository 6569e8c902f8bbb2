"""Scrapes while the engine steps, among connections that say nothing: all are answered, and no bit is another."""

import http.client
import select
import socket
import threading
from contextlib import ExitStack

import streams
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

from streamlstm.engine.core import Engine
from streamlstm.engine.report import StepReport
from streamlstm.records.batch import RecordBatch
from streamlstm.service.http import HttpServer
from streamlstm.service.observer import Committed, Observer, StepTimings
from streamlstm.service.watch import watch
from streamlstm.transport.interfaces import Position

IDLE, SCRAPERS, SCRAPES, STEPS, CONNECTIONS = 300, 10, 10, 60, 64
CONFIG = streams.small_config(series={"max_series": 1000})


def work() -> list[RecordBatch]:
    whole = streams.random_batch(7, STEPS * 20, 12, "mixed")
    return [streams.part(whole, at, at + 20) for at in range(0, STEPS * 20, 20)]


def tell(observer: Observer, report: StepReport) -> None:
    end = report.batch.cut[-1].end
    observer.observe_step(report, StepTimings(0.0, 0.0, 0.0), {})
    observer.observe_commit(Committed([report], len(report.forecasts), 0, 0, 0.0, 0.0, [Position("in", 0, end)]))


class Scraper(threading.Thread):
    """Comes back as often as it is to, and then until the engine is done; ``seen`` is the records counter each time."""

    def __init__(self, port: int, done: threading.Event) -> None:
        super().__init__(name="scraper")
        self.port, self.done, self.seen = port, done, list[float]()

    def run(self) -> None:
        while len(self.seen) < SCRAPES or not self.done.is_set():
            self.seen.append(records(self.port))


def records(port: int) -> float:
    """The sum of a whole exposition's records counters."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics", headers={"Accept": "application/openmetrics-text"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert (answer.status, len(body)) == (200, int(answer.headers["Content-Length"]))
    families = {family.name: family for family in parse(body.decode())}  # raises where the end is missing
    return sum(sample.value for sample in families["streamlstm_records"].samples)


def closed(connection: socket.socket) -> bool:
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable)  # nothing was asked, so there is nothing to read but the end


def test_scrapes_among_idle_connections_are_whole_while_the_engine_steps_and_change_no_bit():
    alone = Engine.create(CONFIG, "cpu")
    for batch in work():
        alone.step(batch)

    before = set(threading.enumerate())
    seen = watch(CONFIG, "hash", "cpu")
    server = HttpServer(
        "127.0.0.1:0", seen.status, seen.metrics.render, max_connections=CONNECTIONS, head_timeout_s=600.0, share_s=0.0
    )
    port = int(server.start().rpartition(":")[2])
    with ExitStack() as stack:
        stack.callback(server.close)
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)) for _ in range(IDLE)]
        done = threading.Event()
        scrapers = [Scraper(port, done) for _ in range(SCRAPERS)]
        for scraper in scrapers:
            scraper.start()
        engine = Engine.create(CONFIG, "cpu")
        for batch in work():
            tell(seen.observer, engine.step(batch))
            ours = set(threading.enumerate()) - before - set(scrapers)
            assert [thread.name for thread in ours] == ["http"]
        done.set()
        for scraper in scrapers:
            scraper.join()

        assert all(len(scraper.seen) >= SCRAPES for scraper in scrapers)
        assert all(scraper.seen == sorted(scraper.seen) for scraper in scrapers)
        assert records(port) == sum(batch.consumed for batch in work())
        # Whoever came first made room: what is left is bounded, however many wanted in.
        for _ in range(IDLE):
            idle = [connection for connection in idle if not closed(connection)]
            if len(idle) > CONNECTIONS:
                select.select(idle, [], [], 1.0)
        assert len(idle) <= CONNECTIONS
    assert engine.state().digests() == alone.state().digests()
