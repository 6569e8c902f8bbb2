"""The device a command computes on."""

import os

from streamlstm.config.model import Config


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
    # Only a warning where there is no such algorithm: integer sums on a GPU, which are exact in any order.
    torch.use_deterministic_algorithms(True, warn_only=True)
    return resolve_device(config.runtime.device)
