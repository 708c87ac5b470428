"""What is known of a run is written beside its report."""

import json
import shutil
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from hermes.artifacts import read_json
from tests.stages.test_report import Page
from tools import provenance, verify

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the committed parameters, lock and manifests of a run on a folder of data."""
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, tmp_path)
    for name, path in provenance.MANIFESTS.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(json.dumps({"source": f"./my-{name}", "revision": None, "files": {}}))
    (tmp_path / "timings").mkdir()
    for stage, seconds in (("train", 600), ("fetch_data", 6), ("rehearsal", 1)):
        record = {
            "stage": stage,
            "seconds": seconds,
            "started": f"2026-01-01T00:0{seconds % 10}:00",
            "commit": "a" * 40,
        }
        (tmp_path / f"timings/{stage}.json").write_text(json.dumps(record))
    return tmp_path


def test_all_that_a_run_came_from_is_written(checkout: Path) -> None:
    provenance.write(["make", "repro"], checkout)
    found = read_json(checkout / provenance.PROVENANCE)
    assert found["command"] == ["make", "repro"]
    assert found["commit"] is None  # it is no clone
    assert found["params"]["train.lora_rank"] == 16
    assert found["origins"]["data"] == {"source": "./my-data", "revision": None}
    assert found["hashes"] == {
        path: md5 for paths in verify.outs((ROOT / "dvc.lock").read_text()).values() for path, md5 in paths.items()
    }
    assert {stage: entry["minutes"] for stage, entry in found["stages"].items()} == {"train": 10.0, "fetch_data": 0.1}
    assert found["packages"]["torch"]
    assert found["machine"]["python"]
    page = (checkout / "reports/provenance.md").read_text()
    for text in (
        f"| torch | {found['packages']['torch']} |",
        "| train | 10.0 |",
        "`make repro`",
        found["machine"]["cpu"]["model"],
    ):
        assert text in page


def test_names_of_others_and_secrets_stay_harmless(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "hf_" + "canary" * 6, "WANDB_API_KEY": "c0ffee" * 7}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    evil = "x | <img src=y> [z](https://example.org) \x1b[31m \u202e @someone\n\n# heading"
    (checkout / provenance.MANIFESTS["model"]).write_text(json.dumps({"source": evil, "revision": evil}))
    provenance.write(["make", evil], checkout)
    text = (checkout / "reports/provenance.md").read_text()
    assert not {"\x1b", "\u202e"} & set(text)
    page = Page(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text))
    assert "img" not in page.tags
    assert page.links == []
    assert page.tags.count("h1") == 1
    written = text + (checkout / provenance.PROVENANCE).read_text()
    assert not [value for value in secrets.values() if value in written]


def test_a_run_without_manifests_or_times_has_them_empty(tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.lock"):
        shutil.copy(ROOT / name, tmp_path)
    provenance.write(["make", "repro"], tmp_path)
    found = read_json(tmp_path / provenance.PROVENANCE)
    assert found["origins"] == {"data": None, "model": None}
    assert found["stages"] == {}
