"""The report at W&B is composed without the network, of what the run has logged, and saved only with a key."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hermes.console import UserError
from hermes.pages.results import read_inputs
from stages import report, train
from tests.stages.test_report import write_reports
from tools import wandb_report

LOCK = """
stages:
  train:
    deps: [{path: data/tokens, md5: aa.dir}, {path: stages/train.py, md5: bb}]
    outs: [{path: models/adapter, md5: cc.dir}, {path: reports/train/summary.json, md5: dd}]
  tokenize:
    outs: [{path: data/tokens, md5: aa.dir}]
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up reports and a lock."""
    write_reports(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    report.main()
    Path("dvc.lock").write_text(LOCK)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["wandb-report", *options])
    wandb_report.main()


def blocks_of(found: Any, kind: str) -> list[Any]:
    return [block for block in found["blocks"] if block["type"] == kind]


def test_a_report_shows_the_run_of_the_training_by_what_it_logs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, "--entity", "someone")
    found = json.loads(Path(".scratch/wandb/report.json").read_text())
    text, files = (block["content"] for block in blocks_of(found, "markdown-block"))
    assert "**The verdict: " in text
    assert "n = " in text
    assert "at a cost.**" in text
    assert "**What it cost.** On prose of scientific abstracts the perplexity went from 21 to 22.05" in text
    assert "| `models-adapter` | model | `cc.dir` | `data/tokens` aa.dir |" in files
    assert "| `data-tokens` | dataset | `aa.dir` | – |" in files
    assert "summary" not in files
    grids = [block["metadata"] for block in blocks_of(found, "panel-grid")]
    for grid in grids:
        (filtered,) = grid["runSets"][0]["filters"]["filters"]
        assert (filtered["key"], filtered["value"]) == ({"section": "run", "name": "name"}, ["0123456789abcdef"])
    panels = [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]
    logged = {*train.HISTORY} | {f"eval_{name}" for name in train.EVALUATION}
    drawn = {
        name for panel in panels if panel["viewType"] == "Run History Line Plot" for name in panel["config"]["metrics"]
    }
    assert drawn == logged
    barred = {name for panel in panels if panel["viewType"] == "Bar Chart" for name in panel["config"]["metrics"]}
    assert (
        {"strict_accuracy.base", "strict_accuracy.merged", "perplexity.base"}
        <= barred
        <= {*wandb_report.numbers(read_inputs())}
    )
    shown = {name for panel in panels if panel["viewType"] == "Media Browser" for name in panel["config"]["mediaKeys"]}
    assert shown == {f"figures/{path.stem}" for path in report.FIGURES.iterdir()}
    assert '"val": "answers"' in json.dumps(panels)
    assert str(workplace) not in json.dumps(found)


def test_it_is_saved_with_a_key_alone(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^SAVE=1 needs WANDB_API_KEY"):
        run(monkeypatch, "--entity", "someone", "--save")
    with pytest.raises(UserError, match=r"^ENTITY=a/b: not a user or team"):
        run(monkeypatch, "--entity", "a/b")
    saved: list[wandb_report.wr.Report] = []
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_report.wr.Report, "url", "https://wandb.ai/someone")
    monkeypatch.setattr(wandb_report.wr.Report, "save", lambda report: saved.append(report))
    run(monkeypatch, "--entity", "someone", "--save")
    assert [one.entity for one in saved] == ["someone"]
    assert not Path(".scratch/wandb/report.json").exists()
    monkeypatch.setattr(wandb_report.wr.Report, "save", lambda report: 1 / 0)
    with pytest.raises(UserError, match=r"^W&B did not take the report: division by zero"):
        run(monkeypatch, "--entity", "someone", "--save")


def test_reports_of_a_training_without_an_id_are_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = json.loads(Path("reports/train/summary.json").read_text())
    Path("reports/train/summary.json").write_text(
        json.dumps({name: value for name, value in summary.items() if name != "run"})
    )
    with pytest.raises(UserError, match="names no run"):
        run(monkeypatch, "--entity", "someone")
