"""The measurement of the importance matrix: what is compared has the same size, and the table says what was measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from gguf import GGUFReader
from ruamel.yaml import YAML

from benchmarks import importance as benchmark
from hermes import params
from hermes.artifacts import scratch_folder, write_json, write_manifest, write_parquet
from hermes.console import UserError
from hermes.evaluation.chat_models import opened
from hermes.instructions.kinds import SEEN_KINDS
from hermes.model import importance
from hermes.model.tokenizer import load_tokenizer
from stages import evaluate
from tests.conftest import ROOT, cpu_params

ROWS = [
    {"question": question, "chosen": f"It is fine, {question}", "rejected": "No.", "topic": topic}
    for question, topic in (("Tell me about kites.", "kites"), ("What is salt?", "salt"), ("Is salt old?", "salt"))
]


@pytest.fixture
def workplace(
    tmp_path: Path, tiny_model_folder: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """What the benchmark reads, and what quantize.json says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "TYPES", ("Q5_0", "Q4_0", "Q4_K_M"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for name in ("dvc.yaml", "packages.yaml"):
        shutil.copy(ROOT / name, name)
    few = {"divergence_pairs": 2, "questions_per_kind": 1, "max_new_tokens": 4}
    YAML().dump(cpu_params(evaluate=few), Path("params.yaml"))
    shutil.copytree(tiny_model_folder, "models/merged")
    write_parquet(Path("data/subset/test.parquet"), pa.Table.from_pylist(ROWS))
    Path("models/gguf").mkdir()
    shutil.copy(gguf_file, "models/gguf/f16.gguf")
    sequences = torch.randint(5, 500, (4, 30), generator=torch.Generator().manual_seed(0)).tolist()
    found = importance.importance(gguf_file, GGUFReader(gguf_file), sequences)
    importance.write(Path("models/gguf/imatrix.gguf"), found, sequences)
    described = {"divides_256": 0.0, "importance": {"pairs": 4, "tokens": 120, "matrices": 14}}
    write_json(Path("models/gguf/quantize.json"), described)
    for folder in ("models/merged", "models/gguf", "data/subset"):
        write_manifest(Path(folder))
    return described


def test_each_type_that_suits_the_model_is_compared_at_one_size(workplace: dict[str, Any], tmp_path: Path) -> None:
    sizes = []
    for by_importance in (False, True):
        with benchmark.made("Q4_0", by_importance) as path:
            sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1]
    found = benchmark.measure(3)
    torch.use_deterministic_algorithms(False)
    assert list(found["types"]) == ["Q5_0", "Q4_0"]  # blocks of 256 do not fit
    assert found["pairs"] == 3
    for row in found["types"].values():
        assert row["change"] == pytest.approx(row["with"] / row["without"] - 1)
        assert row["low"] <= row["change"] <= row["high"]
        assert row["with"] != row["without"]
    assert found["types"]["Q5_0"]["with"] < found["types"]["Q4_0"]["with"]
    assert not list(scratch_folder("importance").iterdir())
    benchmark.write_markdown(found, tmp_path / "importance.md")
    *_, last = (tmp_path / "importance.md").read_text().splitlines()
    row = found["types"]["Q4_0"]
    assert last.startswith(f"| Q4_0 | {sizes[0] / 1e6:.1f} | {row['without']:.5f} | {row['with']:.5f} | ")


@pytest.mark.slow
def test_strict_accuracy_is_compared_where_the_type_was_evaluated(workplace: dict[str, Any], tmp_path: Path) -> None:
    """The file without the matrix answers now; a run of the experiment asked the one with it."""
    Path("data/raw").mkdir()
    shutil.copy(ROOT / "data/embedded/questions.parquet", "data/raw")
    settings = params.load(evaluate.Params).evaluate
    tokenizer = load_tokenizer(Path("models/merged"))
    with benchmark.made("Q4_0", True) as path, opened(path, settings, tokenizer, torch.float32) as model:
        rows = evaluate.grade_answers(evaluate.write_answers(model, settings), model)
    answered = Path("data/evaluation/Q4_0.jsonl")
    answered.parent.mkdir()
    answered.write_text("".join(json.dumps(row | {"strict": True}) + "\n" for row in rows))
    found = benchmark.measure(3)
    torch.use_deterministic_algorithms(False)
    gain = found["types"]["Q4_0"]["strict"]
    assert gain == {"points": 100.0, "low": 100.0, "high": 100.0, "n": len(SEEN_KINDS)}
    assert found["types"]["Q5_0"]["strict"] is None
    benchmark.write_markdown(found, tmp_path / "importance.md")
    *_, without, last = (tmp_path / "importance.md").read_text().splitlines()
    assert without.endswith("| – | – |")
    assert last.endswith("| +100.0 | +100.0 to +100.0 |")
    answered.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(UserError, match=r"Q4_0.jsonl: has the answers to other questions; run `dvc repro evaluate`$"):
        benchmark.measure(3)
    torch.use_deterministic_algorithms(False)


def test_files_that_were_made_without_the_matrix_are_one_line(workplace: dict[str, Any]) -> None:
    write_json(Path("models/gguf/quantize.json"), workplace | {"importance": None})
    write_manifest(Path("models/gguf"))
    with pytest.raises(UserError, match=r"set `quantize\.imatrix: true` and run `dvc repro quantize`$"):
        benchmark.measure(3)
