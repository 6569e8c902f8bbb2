"""Files made in one thread and written in another."""

import hashlib
import os
import queue
import sys
import threading

import pytest

from streamlstm.recovery import encoding
from streamlstm.recovery.background import in_a_thread
from streamlstm.recovery.encoding import Encoder


def test_every_byte_arrives_in_order_and_is_told(monkeypatch):
    monkeypatch.setattr(encoding, "_BLOCK", 10)
    wanted = [b"".join(bytes([i]) * i for i in range(n)) for n in (0, 3, 9, 40)]

    def put(sink, data):
        for first in range(0, len(data), 7):
            sink.write(data[first : first + 7])
        sink.write(memoryview(data))

    got = []
    with Encoder([lambda sink, d=data: put(sink, d) for data in wanted]) as made:
        for _ in wanted:
            blocks: list[bytes] = []
            listed = made.copy_next(lambda block, blocks=blocks: blocks.append(bytes(block)))
            got.append(b"".join(blocks))
            assert listed.bytes == len(got[-1])
            assert listed.sha256 == hashlib.sha256(got[-1]).hexdigest()
            assert all(len(block) < 20 for block in blocks)
    assert got == [data * 2 for data in wanted]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_file_is_hashed_once_whoever_does_it(ahead):
    handed = []
    blocks = encoding._Blocks(handed.append, lambda: ahead)
    for data in (b"a" * 100, b"b" * encoding._BLOCK, b"c"):
        blocks.write(data)
    sha = blocks.end()
    for block in handed:
        assert (block.sha is None) == ahead
        if block.sha is not None:
            block.sha.update(block.data)
    assert sha.hexdigest() == hashlib.sha256(b"".join(block.data for block in handed)).hexdigest()


def test_what_making_a_file_raises_is_raised_where_it_is_written():
    def broken(sink):
        sink.write(b"x" * encoding._BLOCK)
        raise ZeroDivisionError("half way")

    seen = []
    with pytest.raises(ZeroDivisionError, match="half way"), Encoder([broken]) as made:
        made.copy_next(lambda block: seen.append(len(block)))
    assert seen == [encoding._BLOCK]


def test_no_more_is_made_than_so_many_bytes_ahead_and_nothing_once_it_is_left():
    written = 0

    def endless(sink):
        nonlocal written
        while True:
            sink.write(b"x" * encoding._BLOCK)
            written += 1

    def write(_):
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Encoder([endless]) as made:
        made.copy_next(write)
    assert written <= encoding._BLOCKS_AHEAD + 2
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-encode"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it by thread")
def test_a_checkpoint_is_made_and_written_by_threads_that_let_the_loop_go_first():
    seen: queue.Queue[tuple[int, set[int]]] = queue.Queue()

    def tell(_):
        seen.put((os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)))

    def write():
        with Encoder([tell]) as made:
            made.copy_next(lambda _: None)
        tell(None)

    here, processors = os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(0)
    in_a_thread(write)
    for _ in range(2):
        nice, left = seen.get(timeout=10)
        assert nice > here
        assert left == processors if len(processors) == 1 else left < processors
    assert os.getpriority(os.PRIO_PROCESS, 0) == here
    assert os.sched_getaffinity(0) == processors
