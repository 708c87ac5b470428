"""The JSON schema of params.yaml says what the settings allow and what the comments explain."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools import check_params


def test_the_committed_schema_is_the_one_of_the_settings_and_the_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = check_params.schema()
    assert json.loads(Path(check_params.SCHEMA).read_text()) == made, "run: python -m tools.check_params --schema"
    assert Path("params.yaml").read_text().startswith(f"# yaml-language-server: $schema={check_params.SCHEMA}\n")
    train = made["$defs"]["TrainSettings"]["properties"]
    assert train["epochs"]["description"] == "Passes over the pairs."
    assert all(value.get("description") for value in train.values())
