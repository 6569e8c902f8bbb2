"""The mistakes made on purpose (bench/mistakes.py) can still be made, and are looked for where tests are."""

import ast
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MISTAKES = run_path(str(ROOT / "bench" / "mistakes.py"))["MISTAKES"]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_every_edit_of_a_mistake_fits_the_code_and_leaves_python(mistake: Any) -> None:
    texts: dict[str, str] = {}
    for edit in mistake.edits:
        text = texts.get(edit.file) or (ROOT / edit.file).read_text()
        assert text.count(edit.old) == 1, f"{edit.file} holds this {text.count(edit.old)} times:\n{edit.old}"
        texts[edit.file] = text.replace(edit.old, edit.new)
    for file, text in texts.items():
        ast.parse(text, file)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_every_test_that_is_to_notice_a_mistake_is_there(mistake: Any) -> None:
    for test in mistake.tests:
        file, _, name = test.partition("::")
        if file == "lint-imports":
            continue
        there = {part.name for part in ast.parse((ROOT / file).read_text()).body if isinstance(part, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in there, test
