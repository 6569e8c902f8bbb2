"""
One thread, as the service has by default: a second one makes the small products of tests slower, on a busy machine
many times.
"""

import torch

torch.set_num_threads(1)
