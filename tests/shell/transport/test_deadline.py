"""A process that leaves rather than wait for ever."""

import os
import signal
import subprocess
import sys
import threading
import time

from streamlstm.transport.deadline import Deadline

HANGS = """
import time
from streamlstm.transport.deadline import Deadline
with Deadline(0.3).guard("committing a transaction"):
    time.sleep(60)
"""

LONG_ENOUGH = """
import time
from streamlstm.transport.deadline import Deadline
deadline = Deadline(1.5)
with deadline.guard("committing a transaction"):
    print("inside", flush=True)
    input()
    time.sleep(0.3)  # for the watching thread to look at the clock some times
print("outside", flush=True)
"""


def test_a_call_that_hangs_ends_the_process_with_75_and_one_line() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=20, check=False)
    assert ended.returncode == 75
    assert ended.stderr.splitlines() == [
        "streamlstm: no answer for 0.3 s while committing a transaction; leaving so as to be restarted"
    ]


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LONG_ENOUGH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2.0)  # the fact under test: this long it does not run
        os.kill(process.pid, signal.SIGCONT)
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "outside\n"
        assert process.wait(20) == 0


def test_what_is_quick_enough_is_left_alone() -> None:
    expired: list[str] = []
    deadline = Deadline(0.2, expire=expired.append)
    for _ in range(20):
        with deadline.guard("being quick"):
            time.sleep(0.02)
    deadline.close()
    assert expired == []


def test_of_nested_guards_the_one_that_is_late_is_named() -> None:
    expired: list[str] = []
    done = threading.Event()
    deadline = Deadline(0.4, expire=lambda message: (expired.append(message), done.set()))
    with deadline.guard("the outer"):
        time.sleep(0.25)
        with deadline.guard("the inner"):
            assert done.wait(10)
    deadline.close()
    assert "the outer" in expired[0]
