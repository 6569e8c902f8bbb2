from pathlib import Path

import pytest

from streamlstm.config.docs import generated, to_yaml
from streamlstm.config.keys import KEYS
from streamlstm.config.load import load
from streamlstm.config.model import Config

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("file", generated(ROOT), ids=lambda file: file.name)
def test_the_generated_files_are_those_of_the_model(file):
    assert file.read_text(encoding="utf-8") == generated(ROOT)[file], "run `python -m streamlstm.config.docs`"


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*.yaml")), ids=lambda file: file.name)
def test_every_configuration_we_ship_is_right(file):
    assert load(file, environ={}).config


def test_the_full_file_says_every_key_and_nothing_but_defaults():
    full = load(ROOT / "config" / "full.yaml", environ={})
    assert {path for path in full.origins if path in KEYS} == set(KEYS)
    minimal = {
        "source": {"topics": ["metrics.raw"]},
        "decode": {
            "series_id": ["$.host", "$.name"],
            "timestamp": {"path": "$.timestamp"},
            "target": "$.value",
        },
    }
    assert full.config == Config.model_validate(minimal)


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*.yaml")), ids=lambda file: file.name)
def test_what_is_shown_reads_back_as_the_same(file, tmp_path):
    config = load(file, environ={}, sets=["decode.timestamp.unit=%d/%m/%Y", "name=1e3", "series.gap_reset=90m"]).config
    shown = tmp_path / "shown.yaml"
    for origins in (None, {}):
        shown.write_text(to_yaml(config, origins), encoding="utf-8")
        assert load(shown, environ={}).config == config
