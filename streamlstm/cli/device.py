"""The device a command computes on, and the memory it computes in."""

import ctypes
import os
from contextlib import suppress

from streamlstm.config.model import Config

# What glibc calls these settings; 32 MiB is the most it takes for the second.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE_BYTES = 32 << 20
_KEPT_BYTES = 128 << 20


def prepare_device(config: Config) -> str:
    """
    The torch device for ``runtime.device``, with ``runtime.threads`` set and algorithms that give the same bits again.

    Raises :class:`~streamlstm.errors.ConfigError` for a device that is not there.
    """
    # Read by cuBLAS when it starts; without it its products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Imported here, because torch takes longer to load than most commands to run.
    import torch  # noqa: PLC0415, because of the line above

    from streamlstm.engine.device import resolve_device  # noqa: PLC0415, because it loads torch

    torch.set_num_threads(config.runtime.threads)
    # Only a warning where there is no such algorithm: integer sums on a GPU, which are exact in any order. The other
    # function for it loads torch's compiler, which takes most of a second.
    torch.set_deterministic_debug_mode("warn")
    # New memory is written before it is read here; filling it first took a twentieth of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    _keep_freed_memory()
    return resolve_device(config.runtime.device)


def _keep_freed_memory() -> None:
    """
    Let glibc keep up to 128 MiB of what was freed, instead of giving it back to the kernel and asking for it again.

    An update makes and drops some megabytes, and each page that comes anew costs a fault: with them a step took a
    quarter longer. Other C libraries stay as they are.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_ARENA_MAX, 1)  # or each thread would keep as much
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
