"""
What scrapes cost a service that computes without a pause, and how long they take then.

    python bench/scrape.py [--rounds N]

An engine of a thousand series steps back to back and tells its watchers, as the daemon does. In every second round
another process has ten scrapers at 10 Hz each, and 300 connections that say nothing. The rounds without are the peer.
"""

import argparse
import http.client
import itertools
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection

import numpy as np
from engine import batches, config

from streamlstm.cli import interpreter
from streamlstm.cli.device import prepare_device
from streamlstm.engine.core import Engine
from streamlstm.records.batch import RecordBatch
from streamlstm.service.http import HttpServer
from streamlstm.service.observer import Committed, StepTimings
from streamlstm.service.watch import watch

SERIES, PER_STEP, IDLE, SCRAPERS, PERIOD_S, ROUND_S = 1_000, 100, 300, 10, 0.1, 5.0


def scrape(port: int, pipe: Connection) -> None:
    """The other process: waits to be told to begin and to end, and sends how long each scrape took."""
    while pipe.recv():
        took_s: list[float] = []
        over = threading.Event()
        with ExitStack() as stack:
            for _ in range(IDLE):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            threads = [threading.Thread(target=keep_asking, args=(port, over, took_s)) for _ in range(SCRAPERS)]
            for thread in threads:
                thread.start()
            pipe.recv()
            over.set()
            for thread in threads:
                thread.join()
        pipe.send(took_s)


def keep_asking(port: int, over: threading.Event, took_s: list[float]) -> None:
    due_s = time.perf_counter()
    while not over.wait(max(0.0, due_s - time.perf_counter())):
        began_s = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/metrics", headers={"Accept-Encoding": "gzip"})
        answer = connection.getresponse()
        whole = len(answer.read()) == int(answer.headers["Content-Length"])
        connection.close()
        assert (answer.status, whole) == (200, True)
        took_s.append(time.perf_counter() - began_s)
        due_s = max(due_s + PERIOD_S, time.perf_counter())


def endless() -> Iterator[RecordBatch]:
    """A hundred records of each series, over and over, each time later."""
    lap = batches(SERIES, 100 * SERIES, PER_STEP)
    for turn in itertools.count():
        later, later_ns = turn * 100 * SERIES, turn * 100 * 10_000_000_000
        for batch in lap:
            cut = tuple(r._replace(start=r.start + later, end=r.end + later) for r in batch.cut)
            yield replace(batch, cut=cut, offset=batch.offset + later, time_ns=batch.time_ns + later_ns)


def show(what: str, took_s: list[float]) -> None:
    median, p99 = np.percentile(took_s, [50, 99]) * 1e3
    print(f"{what:<44}{len(took_s):>8,}{median:>10.2f} ms{p99:>10.2f} ms{max(took_s) * 1e3:>10.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=6, help="pairs of rounds, one with scrapes and one without")
    rounds = parser.parse_args().rounds
    prepare_device(config())
    interpreter.share_often()
    seen = watch(config(), "0" * 64, "cpu")
    server = HttpServer("127.0.0.1:0", seen.status, seen.metrics.render)
    port = int(server.start().rpartition(":")[2])
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    other = multiprocessing.get_context("spawn").Process(target=scrape, args=(port, theirs), daemon=True)
    other.start()

    engine = Engine.create(config(), "cpu")
    work = endless()

    def step() -> float:
        batch = next(work)
        began_s = time.perf_counter()
        report = engine.step(batch)
        seen.observer.observe_step(report, StepTimings(0.0, 0.0, 0.0), {})
        seen.observer.observe_commit(Committed([report], len(report.forecasts), 0, 0, 0.0, time.time(), []))
        return time.perf_counter() - began_s

    for _ in range(64 * SERIES // PER_STEP):
        step()
    interpreter.freeze()
    steps_s: dict[bool, list[float]] = {True: [], False: []}
    scrapes_s: list[float] = []
    for turn in range(2 * rounds):
        scraped = turn % 2 == 0
        if scraped:
            ours.send(True)
        end_s = time.perf_counter() + ROUND_S
        while time.perf_counter() < end_s:
            steps_s[scraped].append(step())
        if scraped:
            ours.send(None)
            scrapes_s += ours.recv()
    ours.send(None)
    other.join()
    server.close()

    print(f"{SERIES} series, {PER_STEP} records a step; rounds of {ROUND_S:g} s; how many, median, p99, greatest")
    show("a step, nobody scrapes", steps_s[False])
    show("a step, 10 scrapers at 10 Hz, 300 idle", steps_s[True])
    show("a scrape", scrapes_s)


if __name__ == "__main__":
    main()
