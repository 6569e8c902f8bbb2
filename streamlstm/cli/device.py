"""The device a command computes on."""

from streamlstm.config.model import Config


def prepare_device(config: Config) -> str:
    """
    The torch device for ``runtime.device``, with ``runtime.threads`` set.

    Raises :class:`~streamlstm.errors.ConfigError` for a device that is not there.
    """
    # Imported here, because torch takes longer to load than most commands to run.
    import torch  # noqa: PLC0415, because of the line above

    from streamlstm.engine.device import resolve_device  # noqa: PLC0415, because it loads torch

    torch.set_num_threads(config.runtime.threads)
    return resolve_device(config.runtime.device)
