"""The device a command computes on, and the memory it computes in."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from streamlstm.cli.device import prepare_device
from streamlstm.config.model import Config
if sys.argv[1] == "prepared":
    prepare_device(Config.model_validate({
        "source": {"type": "files"},
        "decode": {"series_id": ["$.id"], "timestamp": {"path": "$.t"}, "target": "$.y"},
        "runtime": {"device": "cpu"},
    }))
def work():
    kept = [torch.ones(size << 18) for size in (1, 3, 9, 5)]
for _ in range(3):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_that_was_freed_is_used_again_without_asking_the_kernel():
    assert faults("prepared") < 100 < faults("as it comes")
