"""Servers that speak S3 and GCS, each a process of its own on a port of its own, with a bucket called ``bucket``."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs
import pytest


class Server:
    """A process that answers on ``address``."""

    def __init__(self, process: subprocess.Popen, address: str) -> None:
        self.process, self.address = process, address

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def server(script: str, **environ: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", script.format(port=port)]
    out = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environ) as process:
        try:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.05)
            else:
                pytest.fail("the object store's server did not start")
            yield Server(process, f"127.0.0.1:{port}")
        finally:
            process.kill()


S3 = "from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
GCS = """
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", {port}, in_memory=True, default_bucket="bucket")
server.run()
"""


CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def s3_server() -> Iterator[Server]:
    """Needs ``CREDENTIALS`` in the environment, as do its clients."""
    pytest.importorskip("moto")
    with server(S3) as running:
        client = pafs.S3FileSystem(endpoint_override=running.address, scheme="http", allow_bucket_creation=True)
        client.create_dir("bucket")
        yield running


@contextmanager
def gcs_server() -> Iterator[Server]:
    """Asks for no credentials."""
    pytest.importorskip("gcp_storage_emulator")
    with server(GCS) as running:
        yield running
