"""The device a command computes on, and the memory it computes in."""

import platform
import subprocess
import sys

import pytest

GIVEN_BACK = """
import os, sys, torch
from streamlstm.cli.device import prepare_device
from streamlstm.config.model import Config
if sys.argv[1] == "prepared":
    prepare_device(Config.model_validate({
        "source": {"type": "files"},
        "decode": {"series_id": ["$.id"], "timestamp": {"path": "$.t"}, "target": "$.y"},
        "runtime": {"device": "cpu"},
    }))
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
kept = [torch.ones(6 << 18) for _ in range(16)]
before = resident()
del kept
print((before - resident()) >> 20)
"""


def given_back_mb(how: str) -> int:
    """Of 96 MiB that were freed."""
    run = [sys.executable, "-c", GIVEN_BACK, how]
    return int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_that_was_freed_is_kept_for_what_comes_next():
    assert given_back_mb("prepared") < 10
    assert given_back_mb("as it comes") > 60
