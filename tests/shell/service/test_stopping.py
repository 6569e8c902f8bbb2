import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from streamlstm.service.stopping import Stop, signals_stop


def wait_until(happened) -> None:
    end = time.monotonic() + 5
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_a_flag_and_nothing_else(number):
    stop, left = Stop(), []
    with signals_stop(stop, 10.0, left.append):
        assert not stop.requested
        os.kill(os.getpid(), number)
        wait_until(lambda: stop.requested)
        assert 9 < stop.left_s(10.0) <= 10
    assert left == []


def test_one_request_may_arrive_twice():
    stop, left = Stop(), []
    with signals_stop(stop, 10.0, left.append):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stop.requested)
        time.sleep(0.2)
    assert left == []


def test_a_second_signal_leaves_now():
    stop, left = Stop(), []
    with signals_stop(stop, 10.0, left.append):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: stop.requested)
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: left)
    assert "a second signal" in left[0]


def test_the_deadline_leaves_even_when_the_main_thread_does_not_look():
    stop, left = Stop(), []
    with signals_stop(stop, 0.3, left.append):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: left)
    assert "not finished 0.3 s after the signal" in left[0]


def test_a_main_thread_that_hangs_in_a_call_is_left_behind():
    script = textwrap.dedent(
        """
        import ctypes
        from streamlstm.service.stopping import Stop, signals_stop
        from streamlstm.transport.deadline import leave
        with signals_stop(Stop(), 0.5, leave):
            print("ready", flush=True)
            while True:
                ctypes.CDLL(None).sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 75
        assert time.monotonic() - began < 5


def test_what_was_there_before_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with signals_stop(Stop(), 1.0, lambda _: None):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_wait_ends_with_the_request():
    stop = Stop()
    assert not stop.wait(0.01)
    stop.request()
    assert stop.wait(10.0)
