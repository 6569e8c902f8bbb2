"""
What bits depend on besides the log and the configuration: library versions, the CPU, its instruction sets, the device.

Two runs with equal fingerprints give equal bits; with others they give the same answer up to rounding. ``golden`` is
the digest of what a fixed step comes to here, whatever the names say. ``rows`` is there only where the self-test
failed: such a machine agrees with none, not even with itself.
"""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from streamlstm import __version__
from streamlstm.engine.selftest import golden_step

Fingerprint = Mapping[str, str]

ROWS = "rows"

# Instruction sets that make a matrix multiplication take another path; the rest of the flags change no bit.
_FLAGS = re.compile(r"^(sse4_2|avx|avx2|fma|avx512\w*|avx_\w+|amx_\w+|asimd\w*|sve\w*|bf16|f16c)$")

# Each of these was seen to change bits, or may: they choose other kernels at run time.
_SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")


def take_fingerprint(device: str, threads: int) -> dict[str, str]:
    """The fingerprint of this process, computing on ``device`` with ``threads`` threads."""
    model, flags = parse_cpuinfo(_read(Path("/proc/cpuinfo")))
    return {
        "streamlstm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cpu": model or platform.processor(),
        "cpu_flags": flags,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onednn": _library(r"MKL-DNN v(\S+)") if torch.backends.mkldnn.is_available() else "off",
        "mkl": _library(r"Math Kernel Library Version (\S+)") if torch.backends.mkl.is_available() else "off",
        "threads": str(threads),
        "device": _describe(device),
        "golden": _golden(device),
        "switches": " ".join(f"{name}={os.environ[name]}" for name in _SWITCHES if name in os.environ),
    }


def compare_fingerprints(then: Fingerprint, now: Fingerprint) -> list[str]:
    """
    The differences, in words; empty when bits can be expected to match.

    >>> compare_fingerprints({"torch": "2.12.0", "cpu": "A"}, {"torch": "2.13.0", "cpu": "A"})
    ['torch was 2.12.0 and is 2.13.0']
    """
    told = [
        f"{name} was {then.get(name) or 'not set'} and is {now.get(name) or 'not set'}"
        for name in sorted({*then, *now} - {ROWS})
        if then.get(name) != now.get(name)
    ]
    return told + [f"{when} {side[ROWS]}" for when, side in (("then", then), ("now", now)) if ROWS in side]


def doubt_rows(parts: Sequence[str]) -> dict[str, str]:
    """
    What a fingerprint says besides, where the self-test found parts of the network whose rows depend on each other.

    >>> doubt_rows([]), doubt_rows(["head"])
    ({}, {'rows': 'a row of the head depended on the rows beside it'})
    """
    return {ROWS: f"a row of the {' and the '.join(parts)} depended on the rows beside it"} if parts else {}


def parse_cpuinfo(text: str) -> tuple[str, str]:
    r"""
    Model name and the flags that matter, of the first processor; empty where the kernel does not say.

    >>> parse_cpuinfo("model name\t: Any CPU\nflags\t: fpu avx2 avx vme\n\nmodel name\t: Other\n")
    ('Any CPU', 'avx avx2')
    """
    first = text.split("\n\n", 1)[0]
    fields = {
        name.strip().lower(): value.strip()
        for name, colon, value in (line.partition(":") for line in first.splitlines())
        if colon
    }
    model = fields.get("model name") or fields.get("cpu part") or ""
    flags = (fields.get("flags") or fields.get("features") or "").split()
    return model, " ".join(sorted(flag for flag in flags if _FLAGS.match(flag)))


@cache
def _golden(device: str) -> str:
    return golden_step(device)[:16]


def _describe(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    found = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return f"{found.name} {found.major}.{found.minor}, CUDA {torch.version.cuda}, cuDNN {cudnn}"


def _library(pattern: str) -> str:
    found = re.search(pattern, torch.__config__.show())
    return found[1] if found else "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
