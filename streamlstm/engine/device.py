"""Where tensors live."""

import torch

from streamlstm.errors import ConfigError


def resolve_device(wanted: str) -> str:
    """
    The torch device for ``runtime.device``: ``auto`` takes a GPU if there is one.

    Raises :class:`~streamlstm.errors.ConfigError` when a GPU is asked for and is not there.
    """
    if wanted == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return wanted
    index = int(wanted.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        found = f"this machine has {count} usable GPU(s)" if count else "no usable GPU was found"
        raise ConfigError(f"runtime.device: {wanted} was asked for, but {found}; use cpu or auto")
    return f"cuda:{index}"
