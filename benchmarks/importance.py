"""GGUF files rounded with and without the importance matrix, at the same size: reports/importance.json and reports/importance.md.

    python -m benchmarks.importance [--pairs N]    after `make repro` with `quantize.imatrix: true`

For each type that suits the model, a file is made by models/gguf/imatrix.gguf, and another without it whose tensors have the same types.
llama.cpp would mix them a little differently then, and compare files of two sizes. Both are held against the merged model in float32: KL
over the tokens of the chosen answers to held-out test pairs, paired by pair. A file whose answers `make repro` has in data/evaluation is
asked the same instructions without the matrix, too.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from gguf import GGUFReader

from hermes import params
from hermes.artifacts import check_together, complete_file, read_json, scratch_folder, write_json
from hermes.console import UserError
from hermes.evaluation.chat_models import opened
from hermes.evaluation.held_out import SUBSET, read_held_out
from hermes.evaluation.intervals import paired_ratio
from hermes.model.base import compute_type, set_determinism
from hermes.model.gguf_files import quantize
from hermes.model.importance import read
from hermes.model.tokenizer import load_tokenizer
from hermes.run import run_tool
from hermes.settings.evaluate import EvaluateSettings
from hermes.settings.quantize import Blocks256
from stages import evaluate
from stages.evaluate import GGUF, MERGED, Exact, Opener, Params

REPORTS = Path("reports")
TYPES = ("Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")
Result = dict[str, Any]


@contextmanager
def made(kind: str, by_importance: bool) -> Iterator[Path]:
    """A file of this type, without the matrix in the types that its tensors have with it; it is gone afterwards."""
    columns, source = read(GGUF / "imatrix.gguf"), GGUF / "f16.gguf"
    path = scratch_folder("importance") / f"{kind}.gguf"
    with complete_file(path) as temporary:
        quantize(source, temporary, kind, importance=columns)
        types = {tensor.name: tensor.tensor_type for tensor in GGUFReader(temporary).tensors}
        if not by_importance:
            quantize(source, temporary, kind, tensor_types=types)
    yield path
    path.unlink()


def compare(kind: str, exact: Exact, open_model: Opener, settings: EvaluateSettings) -> Result:
    """The size of both files in bytes, the KL of each in nats a token, and by which share the importance matrix changes it.

    `strict` is the paired gain in strict accuracy that the matrix brings, in points, where data/evaluation has the answers of the file
    that was made with it.

    Raises:
        UserError: those are of other questions.
    """
    found = {}
    strict = None
    answered = evaluate.OUTPUT / f"{kind}.jsonl"
    for way in (False, True):
        with made(kind, way) as path, open_model(path) as model:
            size = path.stat().st_size
            found[way] = exact.divergence(model)
            if not way and answered.is_file() and "instructions" in settings.tasks:
                before = evaluate.grade_answers(evaluate.write_answers(model, settings), model)
                after = [json.loads(line) for line in answered.read_text().splitlines()]
                if [row["id"] for row in before] != [row["id"] for row in after]:
                    raise UserError(f"{answered}: has the answers to other questions; run `dvc repro evaluate`")
                strict = evaluate.compare(after, before, "without")["strict"]
    rows = [
        (topic, before, after, tokens)
        for (topic, before, tokens), (_, after, _) in zip(
            found[False]["by_topic"], found[True]["by_topic"], strict=True
        )
    ]
    kl = {"without": found[False]["mean_kl"], "with": found[True]["mean_kl"]}
    return {"bytes": size, **kl, **paired_ratio(rows), "strict": strict}


def measure(pairs: int | None) -> Result:
    """All types that suit the model; the content of reports/importance.json.

    Raises:
        UserError: what is measured is missing, or was made without an importance matrix.
    """
    loaded = params.load(Params)
    check_together(SUBSET, MERGED, GGUF)
    described = read_json(GGUF / "quantize.json")
    if not described["importance"]:
        raise UserError(
            "models/gguf: was made without an importance matrix; set `quantize.imatrix: true` and run `dvc repro quantize`"
        )
    count = pairs or loaded.evaluate.divergence_pairs
    settings = loaded.evaluate.model_copy(update={"split": "test", "tasks": ["preference"], "divergence_pairs": count})
    set_determinism(settings.threads)
    tokenizer = load_tokenizer(MERGED)
    exact = Exact.of(settings, tokenizer, read_held_out(settings, tokenizer)["preference"])
    open_model = partial(opened, batching=settings, tokenizer=tokenizer, dtype=compute_type(loaded.bits))
    types = [kind for kind in TYPES if described["divides_256"] >= 0.5 or kind not in get_args(Blocks256)]
    return {
        "types": {kind: compare(kind, exact, open_model, loaded.evaluate) for kind in types},
        "pairs": len(exact.prompts),
        "importance": described["importance"],
        "versions": {name: version(name) for name in ("llama-cpp-python", "torch", "transformers")},
    }


def strict_cells(gain: Result | None) -> str:
    """The last two cells of a row of the table."""
    return f"{gain['points']:+.1f} | {gain['low']:+.1f} to {gain['high']:+.1f}" if gain else "– | –"


def write_markdown(found: Result, path: Path) -> None:
    """The table of reports/importance.md."""
    about = found["importance"]
    tokens = next(iter(found["types"].values()))["n"]
    lines = [
        "# What the importance matrix is worth",
        "",
        f"`python -m benchmarks.importance --pairs {found['pairs']}`: KL(merged in float32 || file) in nats a token over {tokens:,} tokens "
        f"of the chosen answers to {found['pairs']:,} held-out test pairs. The matrix is of {about['pairs']:,} training pairs "
        f"({about['tokens']:,} tokens). Without it each tensor has the same type as with it, and so the file the same size. "
        "The change is paired by pair; its 95 % interval is over topics. Strict accuracy is of the types that `make repro` evaluated. "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + ".",
        "",
        "| type | MB | KL without | KL with | change | 95 % interval | strict accuracy, points | 95 % interval |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {kind} | {row['bytes'] / 1e6:.1f} | {row['without']:.5f} | {row['with']:.5f} | {row['change']:+.1%} "
        f"| {row['low']:+.1%} to {row['high']:+.1%} "
        f"| {strict_cells(row['strict'])} |"
        for kind, row in found["types"].items()
    ]
    with complete_file(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.importance", description="Measure GGUF files with and without the importance matrix."
    )
    parser.add_argument("--pairs", type=int, help="held-out pairs; as many as evaluate.divergence_pairs unless given")
    found = measure(parser.parse_args().pairs)
    write_json(REPORTS / "importance.json", found)
    write_markdown(found, REPORTS / "importance.md")
    print((REPORTS / "importance.md").read_text())


if __name__ == "__main__":
    run_tool("importance", main)
