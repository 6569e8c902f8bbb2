"""How the interpreter is set for a loop that must not wait: not for other threads, nor for the garbage collector."""

import gc
import sys

# How long a thread keeps the interpreter while another waits for it; Python's own is ten times that. The loop gives it
# away at each of a step's many small operations, and waits so long to have it back whenever a checkpoint is written.
_SWITCH_INTERVAL_S = 0.0005


def share_often() -> None:
    """Let threads take turns more often than by default."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def thaw() -> None:
    """Before a session: what the one before it left is collected."""
    gc.unfreeze()
    gc.collect()


def freeze() -> None:
    """Before the loop: what is there now is looked through no more, which took a tenth of a second each time."""
    gc.collect()
    gc.freeze()
