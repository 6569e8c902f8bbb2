"""
The seven worst mistakes and some of their kind, made on purpose in a copy of the tree, one at a time, and the tests
that must notice.

``python bench/mistakes.py`` runs those that need no broker, ``--all`` every one; a word more chooses the mistakes with
that word in their name. Each row is a mistake, its edits as
(file, old, new), and tests of which every single one has to fail; an edit that no longer fits its file is an error.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Edit(NamedTuple):
    """A text that a file holds once, and what stands there instead."""

    file: str
    old: str
    new: str


class Mistake(NamedTuple):
    """What was done wrong, and by whom it must be noticed."""

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


SIMULATOR = "tests/simulator/test_simulator.py"
LAWS = "tests/core/engine/test_laws.py"
ENUMERATION = f"{SIMULATOR}::test_every_operation_on_the_disk_may_fail_or_be_the_last"
CAMPAIGN = f"{SIMULATOR}::test_hundreds_of_kills_cost_nothing"
LINKS = f"{SIMULATOR}::test_every_link_to_a_file_of_an_older_checkpoint_may_fail_or_be_the_last"
TWIST = SIMULATOR + "::test_each_twist_costs_nothing_either[{}]"
POWER = (
    "tests/shell/recovery/test_power_loss.py::"
    "test_no_power_cut_leaves_a_torn_checkpoint_or_loses_one_that_was_announced"
)
CODES = "tests/kafka/test_error_codes.py::test_an_error_ends_in_a_commit_of_all_or_in_its_own_way"

ORACLE = "tests/core/engine/test_oracle.py"

DIRECTORY = "streamlstm/recovery/directory.py"
STORED = "streamlstm/recovery/stored.py"
PUBLISHER = "streamlstm/transport/kafka/publisher.py"

MISTAKES = (
    Mistake(
        "no directory fsync: the names in a new generation",
        (Edit(DIRECTORY, "        self._disk.sync_directory(self._temporary)\n", ""),),
        (POWER, ENUMERATION, LINKS),
    ),
    Mistake(
        "no directory fsync: the rename",
        (
            Edit(
                DIRECTORY,
                "self._disk.rename(self._temporary, self._final)\n        self._disk.sync_directory(self._directory)\n",
                "self._disk.rename(self._temporary, self._final)\n",
            ),
        ),
        (POWER, ENUMERATION, CAMPAIGN),
    ),
    Mistake(
        "commit before flush",
        (
            Edit(
                PUBLISHER,
                "        offset = sending.settle()\n        assert offset is not None\n"
                "        self._producer.commit_transaction()\n",
                "        self._producer.commit_transaction()\n"
                "        offset = sending.settle()\n        assert offset is not None\n",
            ),
        ),
        (CAMPAIGN, f"{CODES}[Produce-45]"),
    ),
    Mistake(
        "auto-reset to latest",
        (
            Edit(
                "streamlstm/transport/kafka/settings.py",
                '"auto_offset_reset": "none"',
                '"auto_offset_reset": "latest"',
            ),
        ),
        (
            "tests/shell/transport/test_kafka_settings.py",
            "tests/kafka/test_kafka_source.py::test_a_position_that_retention_deleted_is_a_gap_with_its_offsets",
            "tests/kafka/test_kafka_source.py::test_a_position_beyond_the_end_is_a_log_that_was_cut_back",
        ),
    ),
    Mistake(
        "offsets from the group",
        (
            Edit(
                "streamlstm/transport/kafka/source.py",
                "        for tp, offset in wanted.items():\n            epoch = ",
                "        with admin(self._config.source) as client:\n"
                "            told = client.list_group_offsets({self._config.name: None})[self._config.name]\n"
                "        wanted |= {tp: at.offset for tp, at in told.items() if tp in wanted}\n"
                "        for tp, offset in wanted.items():\n            epoch = ",
            ),
        ),
        ("tests/kafka/test_faults.py::test_what_the_consumer_group_says_moves_nothing",),
    ),
    Mistake(
        "retry after a failed fsync",
        (
            Edit(
                DIRECTORY,
                "        self._disk.sync(self._file)\n",
                "        try:\n            self._disk.sync(self._file)\n"
                "        except OSError:\n            self._disk.sync(self._file)\n",
            ),
        ),
        (ENUMERATION, CAMPAIGN),
    ),
    Mistake(
        "mask by multiplication: targets that have not arrived",
        (
            Edit(
                "streamlstm/learning/tbptt.py",
                "error_TBK.masked_fill_(missing_TBK, 0)",
                "error_TBK.mul_(~missing_TBK)",
            ),
        ),
        ("tests/core/learning/test_tbptt.py", f"{ORACLE}::test_hostile_values_spoil_neither_weights_nor_forecasts"),
    ),
    Mistake(
        "mask by multiplication: windows that lost their carry",
        (
            Edit(
                "streamlstm/engine/core.py",
                "            windows = Windows(*(tensor[chosen] for tensor in windows)) if len(used) else None\n",
                "            mask = torch.from_numpy(queued.usable).to(self._device)\n"
                "            windows = Windows(*(t * mask.view(-1, *[1] * (t.dim() - 1)) for t in windows))\n",
            ),
        ),
        (f"{LAWS}::test_a_carry_zeroed_after_a_window_joined_leaves_the_window_wherever_steps_end",),
    ),
    Mistake(
        "mask by multiplication: carries that are not finite",
        (
            Edit(
                "streamlstm/learning/cells.py",
                "        self._h[bad] = 0\n        self._c[bad] = 0\n",
                "        self._h.mul_(~bad.unsqueeze(1))\n        self._c.mul_(~bad.unsqueeze(1))\n",
            ),
        ),
        ("tests/core/learning/test_cells.py", f"{LAWS}::test_weights_that_overflow_change_no_law"),
    ),
    Mistake(
        "wall clock in the engine: what lies in the future",
        (
            Edit(
                "streamlstm/series/admission.py",
                "        if broker >= 0 and t > broker + max_ahead:\n",
                "        if broker >= 0 and t > time_module.time_ns() + max_ahead:\n",
            ),
            Edit(
                "streamlstm/series/admission.py",
                "from dataclasses import dataclass\n",
                "import time as time_module\nfrom dataclasses import dataclass\n",
            ),
        ),
        ("tests/core/series/test_admission.py", "lint-imports"),
    ),
    Mistake(
        "wall clock in the engine: the seed",
        (
            Edit("streamlstm/learning/model.py", "manual_seed(seed)", "manual_seed(time.time_ns())"),
            Edit("streamlstm/learning/model.py", "\nimport torch\n", "\nimport time\n\nimport torch\n"),
        ),
        (LAWS, "lint-imports"),
    ),
    Mistake(
        "series beyond memory: forgotten at a start",
        (Edit(STORED, "                if not needed.all():\n", "                if False:\n"),),
        (TWIST.format("forgetful"),),
    ),
    Mistake(
        "series beyond memory: who left in the step after a checkpoint is in none",
        (
            Edit(
                "streamlstm/recovery/leavers.py",
                "self.linked, after = base.files, base.step\n",
                "self.linked, after = base.files, base.step + 1\n",
            ),
        ),
        (TWIST.format("forgetful"),),
    ),
    Mistake(
        "series beyond memory: what killed processes left is not swept up",
        (Edit(STORED, "            sweep(directory)\n", "            pass\n"),),
        (TWIST.format("forgetful"),),
    ),
    Mistake(
        "on_gap: skip without its record in the chain",
        (Edit("streamlstm/recovery/resume.py", "    _append(world, terms, chain, gap, ident)\n", ""),),
        (TWIST.format("gaps"),),
    ),
    Mistake(
        "an exclusion forgotten once the chain is trimmed behind it: by a start",
        (
            Edit(
                "streamlstm/recovery/resume.py",
                "    excluded = chain.excluded_after(generation.provenance.excluded)\n    pending =",
                "    excluded = chain.excluded or ()\n    pending =",
            ),
        ),
        (TWIST.format("branches"),),
    ),
    Mistake(
        "an exclusion forgotten once the chain is trimmed behind it: by a checkpoint",
        (Edit("streamlstm/service/daemon.py", "            excluded=self._excluded,\n", ""),),
        (TWIST.format("branches"),),
    ),
    Mistake(
        "an upload whose end is not waited for",
        (
            Edit(
                "streamlstm/recovery/objects.py",
                "        self._caller.call(self._stream.close)\n        self._over = True\n",
                "        self._line.put(self._stream.close)\n        self._over = True\n",
            ),
        ),
        (TWIST.format("bucket"),),
    ),
)


def main() -> int:
    everything = "--all" in sys.argv[1:]
    words = [word for word in sys.argv[1:] if word != "--all"]
    missed = 0
    sound: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch:
        untouched = Path(scratch) / "untouched"
        _copy(untouched)
        for number, mistake in enumerate(MISTAKES):
            if not all(word in mistake.name for word in words):
                continue
            tree = Path(scratch) / str(number)
            _copy(tree)
            for edit in mistake.edits:
                _apply(tree, edit)
            print(mistake.name, flush=True)
            for test in mistake.tests:
                if "tests/kafka" in test and not everything:
                    print(f"    not run           {test}")
                    continue
                if test not in sound and _fails(untouched, test):
                    sys.exit(f"{test} fails without any mistake")
                sound.add(test)
                began = time.monotonic()
                noticed = _fails(tree, test)
                missed += not noticed
                told = "noticed" if noticed else "NOT NOTICED"
                print(f"    {told:11} {time.monotonic() - began:4.0f} s {test}", flush=True)
    return 1 if missed else 0


def _copy(tree: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    shared = ROOT.parent / "shared"
    if shared.exists() and not (tree.parent / "shared").exists():
        (tree.parent / "shared").symlink_to(shared.resolve())


def _apply(tree: Path, edit: Edit) -> None:
    path = tree / edit.file
    text = path.read_text()
    if text.count(edit.old) != 1:
        sys.exit(f"{edit.file} holds this {text.count(edit.old)} times, so the mistake cannot be made:\n{edit.old}")
    path.write_text(text.replace(edit.old, edit.new))


def _fails(tree: Path, test: str) -> bool:
    """Whether the suite's own tool says so; anything but a failed test (no such test, say) is an error."""
    binaries = Path(sys.executable).parent
    environment = {"PYTHONPATH": str(tree), "PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(Path.home())}
    command = [str(binaries / "lint-imports")] if test == "lint-imports" else [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not soak", test,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"{test} could not be run:\n{done.stdout}{done.stderr}")
    return done.returncode == 1


if __name__ == "__main__":
    sys.exit(main())
