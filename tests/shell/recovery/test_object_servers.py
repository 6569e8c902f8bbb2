"""The same promises over the wire: a server that speaks S3, and one that speaks GCS."""

import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fakes import Broker, Process, message
from test_object_store import provenance, sound, state, write

from streamlstm.errors import CheckpointNotWritten, ConfigError, Temporary
from streamlstm.recovery.checkpoint import Keep, open_store


@pytest.fixture(params=["s3", "gcs"])
def url(request) -> str:
    """A prefix of its own on each server."""
    server = request.getfixturevalue(request.param)
    who = {"s3": "s3://bucket", "gcs": "gs://anonymous@bucket"}[request.param]
    return f"{who}/{uuid.uuid4().hex}/state?scheme=http&endpoint_override={server.address}"


def test_generations_are_written_verified_loaded_put_aside_and_pruned(url):
    store = open_store(url).open()
    assert store.newest() == (None, [])
    write(store, 1, 2, 3)

    other = open_store(url)
    assert other.steps() == [1, 2, 3]
    assert other.verify(2).provenance == provenance(2)
    assert sound(other) == 3
    assert store.put_aside(3) == "00000000000000000003.bad-1"
    assert (other.steps(), other.bad(), sound(other)) == ([1, 2], ["00000000000000000003.bad-1"], 2)
    assert store.prune(Keep(1)) == ""
    assert other.steps() == [2]
    store.close()
    assert sound(open_store(url).open()) == 2


def test_generation_0_is_replaced_at_one_instant(url):
    store = open_store(url).open()
    for lineage in ("old", "new"):
        store.write(state(0), provenance(0, lineage))

    loaded, refused = open_store(url).newest()

    assert loaded is not None
    assert (loaded.generation.provenance.lineage, refused) == ("new", [])


def test_a_large_object_comes_back_as_it_went(url):
    big = state(4, series=30_000)
    open_store(url).open().write(big, provenance(4))

    assert open_store(url).load(4).state.digests() == big.digests()


def test_a_service_goes_on_over_a_bucket(url):
    broker = Broker(inputs={"in": [[message(f"k{i % 4}", float(i)) for i in range(60)]]})
    first = Process(broker, open_store(url)).run()
    assert open_store(url).steps()[-1] == first.step_number
    broker.inputs["in"][0] += [message("k1", 7.0)] * 40

    second = Process(broker, open_store(url))
    engine = second.run()

    assert second.ready is not None
    assert (second.ready.source, second.ready.replayed_steps) == ("checkpoint", 0)
    assert engine.records == 100


def test_a_bucket_that_is_not_there_is_a_matter_of_configuration(url):
    elsewhere = url.replace("bucket/", "nowhere/")

    with pytest.raises(ConfigError, match=r"checkpoint\.url: .*//.*nowhere/") as caught:
        open_store(elsewhere).open()
    assert caught.value.exit_code == 78


class Forbidding(BaseHTTPRequestHandler):
    def answer(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = do_PUT = do_POST = answer

    def log_message(self, *args: object) -> None: ...


@pytest.mark.parametrize("scheme", ["s3://bucket", "gs://anonymous@bucket"])
def test_credentials_that_are_refused_are_a_matter_of_configuration(scheme):
    with ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = open_store(f"{scheme}/prefix?scheme=http&endpoint_override=127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigError, match="it must be a bucket that exists") as caught:
            store.open()
        server.shutdown()
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("scheme", ["s3://bucket", pytest.param("gs://anonymous@bucket", marks=pytest.mark.soak)])
def test_a_store_nobody_serves_is_told_within_30_s(scheme):
    store = open_store(f"{scheme}/prefix?scheme=http&endpoint_override=127.0.0.1:9")
    began = time.monotonic()

    with pytest.raises(CheckpointNotWritten) as caught:
        store.open()
    assert time.monotonic() - began < 30
    assert caught.value.exit_code == 74


@pytest.mark.soak
def test_a_server_that_stops_answering_is_waited_for_30_s_a_call_and_taken_up_again(request):
    for name, who in (("s3", "s3://bucket"), ("gcs", "gs://anonymous@bucket")):
        server = request.getfixturevalue(name)
        url = f"{who}/frozen?scheme=http&endpoint_override={server.address}"
        store = write(open_store(url).open(), 1)
        server.freeze()
        began = time.monotonic()
        with pytest.raises(CheckpointNotWritten):
            write(store, 2)
        written = time.monotonic()
        with pytest.raises(Temporary):
            open_store(url).newest()
        read = time.monotonic()
        print(f"{name} frozen: writing fails after {written - began:.1f} s, reading after {read - written:.1f} s")
        assert written - began < 30
        assert read - written < 30
        server.thaw()
        assert sound(write(store, 3)) == 3


def test_a_note_tells_who_came_last(url):
    open_store(url).open()

    assert open_store(url)._place.get("opened-by") == f"{socket.gethostname()} {os.getpid()}\n".encode()


def test_a_process_ends_at_once_with_its_own_code_while_a_call_hangs():
    script = """
import sys
from streamlstm.cli.main import main
from streamlstm.errors import Superseded
from streamlstm.cli import main as module

def command(**_):
    from streamlstm.recovery.checkpoint import CheckpointStore, open_store
    place = open_store(sys.argv[1])._place
    place._caller._limit_s = 1.0
    try:
        place.open()
    except OSError as error:
        raise Superseded(f"after {error}") from error

module.cli.main = command
sys.exit(main())
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"s3://bucket/prefix?scheme=http&endpoint_override=127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        ended = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("did not answer within 1 s")) == (76, 1), ended.stderr
    print(f"ended after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 30
