import os
import subprocess
import sys
import time

import pytest
import torch

from streamlstm.engine.selftest import dependent_rows, golden_step
from streamlstm.learning.model import Shape


def test_the_golden_step_is_the_same_each_time_and_quick():
    golden_step("cpu")
    began = time.process_time()

    assert golden_step("cpu") == golden_step("cpu")
    assert (time.process_time() - began) / 2 < 0.3


def test_the_golden_step_shows_that_other_kernels_compute():
    """As on a machine with another instruction set, which a library's version does not tell."""
    program = "from streamlstm.engine.selftest import golden_step; print(golden_step('cpu'))"
    environ = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)

    assert len(told.stdout.strip()) == 64
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert told.stdout.strip() != golden_step("cpu")


@pytest.mark.parametrize("shape", [Shape(5, 5, 3), Shape(13, 64, 24), Shape(3, 128, 1), Shape(19, 33, 96)])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_independent_here(shape, threads):
    torch.set_num_threads(threads)

    assert dependent_rows(shape, "cpu") == []


def test_a_row_that_feels_its_neighbours_is_found_and_named():
    shape = Shape(5, 8, 3)

    def plain(parameters, x_NF, h_NH, c_NH):
        return {"hidden state": h_NH, "head": h_NH + x_NF.mean()}

    assert dependent_rows(shape, "cpu", plain) == ["head"]


def test_a_product_without_tiles_is_found():
    """What the tiles are for: the library gives a row alone other bits than among many."""
    shape = Shape(19, 64, 24)

    def untiled(parameters, x_NF, h_NH, c_NH):
        return {"gates": torch.cat([x_NF, h_NH], 1) @ parameters.gates}

    assert dependent_rows(shape, "cpu", untiled) == ["gates"]


def test_a_row_that_moves_within_the_tile_is_found():
    def by_place(parameters, x_NF, h_NH, c_NH):
        return {"head": h_NH + 1e-6 * torch.arange(len(h_NH)).unsqueeze(1)}

    assert dependent_rows(Shape(5, 8, 3), "cpu", by_place) == ["head"]
