"""A profile's run on random weights of its model's exact shape, on whatever machine is here: `make rehearse PROFILE=a40`.

    python -m tools.rehearse --profile a40                 (or: make rehearse PROFILE=a40)
    python -m tools.rehearse --profile a40 --pairs 8       the same with a step of fewer pairs
    python -m tools.rehearse --profile a40 --layers 2 --pairs 4    and with fewer layers, in minutes

It proves what can be proved without the GPU, the data and the weights: that every stage works at that size and what memory, disk and time
it takes. In a copy of the tracked files (.scratch/rehearsal) whose params.yaml is the profile's, with random weights, Llama-3's own
tokenizer and Hermes-shaped rows for one optimizer step, DVC runs the stages up to the GGUF; then that file is loaded and writes 8 tokens.
The learning rate has no warm-up there, so that the step moves the adapter. What has run is not run again: start it again after an
interruption. reports/rehearsal.json and .md say what each stage took, rehearsal-8 that of a step of 8 pairs; with fewer layers they
are in the copy.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hermes import params
from hermes.artifacts import complete_file, complete_folder, read_json, scratch_folder, write_json, write_parquet
from hermes.console import UserError
from hermes.model import llama3
from hermes.model.bf16_on_cpu import has_bfloat16
from hermes.model.gguf import GgufModel
from hermes.model.llama3 import Shape
from hermes.model.safetensors_stream import DTYPES, PIECE, Stored, write_folder
from hermes.settings.experiment import Profile
from tools import doctor
from tools.dvc_runs import environment
from tools.memory_plan import gibibytes
from tools.plan import BITS, load, model_shape, pair_lengths
from tools.profiles import write_params

ROOT = Path(__file__).parent.parent
REPORTS = Path("reports")
STAGES = ("fetch_data", "fetch_model", "subset", "tokenize", "reference", "train", "merge", "quantize")
TYPE, NEW_TOKENS, HELD_OUT = "Q4_K_M", 8, 4
SAMPLE_SECONDS = 0.5  # between looks at memory and disk, at least
SAMPLE_SHARE = 0.03  # of all time, which looking may take


@dataclass
class Peak:
    """The most memory that a process and its children held together, in bytes: of their own, and with the files they mapped.

    And the most disk that a folder took meanwhile.
    """

    anonymous: int = 0
    resident: int = 0
    disk: int = 0


def random_model(folder: Path, shape: Shape, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes a Llama of this shape with random weights in bfloat16, a tensor at a time, and the tokenizer.

    Like the published base it brings no generation config.
    """
    config = llama3.config_of(
        shape,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if shape.tied:
        sizes.pop("lm_head.weight")
    tensors = [Stored(name, "BF16", dims, folder, 0, 2 * int(np.prod(dims))) for name, dims in sorted(sizes.items())]
    generator = torch.Generator().manual_seed(0)

    def content(tensor: Stored) -> Iterator[bytes]:
        left = tensor.size // 2
        while left:
            count = min(PIECE, left)
            values = (
                torch.ones(count)
                if len(tensor.shape) == 1
                else torch.empty(count).normal_(0, 0.02, generator=generator)
            )
            yield values.to(DTYPES[tensor.dtype]).view(torch.uint8).numpy().tobytes()
            left -= count

    with complete_folder(folder) as target:
        write_folder(target, tensors, content, 5 * 10**9)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(target)
        tokenizer.save_pretrained(target)


def random_rows(loaded: Profile, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of random words whose lengths in tokens are those of the profile's pairs, or of a mix like Hermes'."""
    random = np.random.default_rng(seed)
    lengths, _ = pair_lengths(loaded)
    words = [
        word for i in range(1000, 20_000) if (word := str(tokenizer.decode([i]))).startswith(" ") and word[1:].isalpha()
    ]

    def text(tokens: int) -> str:
        return "".join(random.choice(words, max(1, tokens))).strip()

    picked = random.choice(len(lengths.prompt), count)
    return [
        {
            "question": text(int(lengths.prompt[i])),
            "chosen": text(int(lengths.chosen[i])),
            "rejected": text(int(lengths.rejected[i])),
            "delta_score": 2.0 + i / len(lengths.prompt),
        }
        for i in picked
    ]


def overrides(loaded: Profile, pairs: int, model: str) -> dict[str, dict[str, Any]]:
    """What the rehearsal sets in the profile: its material, one step that moves the adapter, and this machine's threads."""
    batch_size = math.gcd(pairs, loaded.train.batch_size)  # so that the step is of all of them
    return {
        "data": {
            "source": "./rows",
            "revision": None,
            "config": None,
            "splits": {"train": "train", "validation": "validation", "test": "validation"},
            "format": "plain",
            "columns": {
                "question": "question",
                "chosen": "chosen",
                "rejected": "rejected",
                "score": "delta_score",
                "system": None,
            },
        },
        "model": {"source": model, "revision": None},
        "subset": {"k": pairs},
        "base": {"threads": os.cpu_count() or 1},
        "train": {
            "batch_size": batch_size,
            "accumulation": pairs // batch_size,
            "max_steps": 1,
            "warmup_steps": 0,
            "warmup_ratio": 0.0,
            "evaluations": 0,
        },
        "quantize": {"types": [TYPE]},
    }


def check_disk(folder: Path, shape: Shape) -> None:
    """Refuses a disk without room for base, merged model and f16 GGUF, two bytes a weight each, and the quantized one.

    Raises:
        UserError: there is less room than they still need.
    """
    weights = shape.linear_weights + shape.other_weights
    needed = weights * (3 * 2 + BITS[TYPE] / 8) - disk_used(folder)
    check = doctor.check_disk(ROOT, needed / 2**30)
    if not check.ok:
        raise UserError(f"{check.finding}; {check.mend}, or use fewer --layers")


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def prepare(folder: Path, profile: str, loaded: Profile, pairs: int, shape: Shape, needs_weights: bool) -> None:
    """Makes the copy that the rehearsal runs in: code, params, rows, and random weights until they are fetched. What is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("hermes", "stages", "packages.yaml", "dvc.yaml", "run-stage", ".dvcignore"):
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    if not (folder / ".dvc").is_dir():
        subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=folder, check=True)
        for key, value in (("core.analytics", "false"), ("cache.type", "hardlink,symlink")):
            subprocess.run([sys.executable, "-m", "dvc", "config", key, value], cwd=folder, check=True)
    embedded = folder / "data/embedded"  # fetch_data depends on these, whatever it reads
    embedded.mkdir(parents=True, exist_ok=True)
    for name in ("train.parquet", "validation.parquet", "test.parquet", "questions.parquet", "plain.jsonl"):
        shutil.copy2(ROOT / "data/embedded" / name, embedded / name)
    tokenizer = llama3.tokenizer()
    if not (folder / "rows").is_dir():
        with complete_folder(folder / "rows") as rows:
            for split, count, seed in (("train", 2 * pairs, 1), ("validation", HELD_OUT, 2)):
                table = pa.Table.from_pylist(random_rows(loaded, tokenizer, count, seed))
                write_parquet(rows / f"{split}.parquet", table)
    if needs_weights and not (folder / "random-model").is_dir():
        print(
            f"rehearse: writing {(shape.linear_weights + shape.other_weights) / 1e9:.2f} billion random weights",
            flush=True,
        )
        random_model(folder / "random-model", shape, tokenizer)
    write_params(ROOT / params.PARAMS, folder / params.PARAMS, profile, overrides(loaded, pairs, "./random-model"))


def memory_of(process: psutil.Process) -> Peak:
    """What a process and its children hold now; a page that several of them have counts once.

    Linux walks all their pages for it, and meanwhile they can neither map nor free memory: half a second at 20 GB.
    """
    found = Peak()
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has ended
            continue
        sizes = {name: 1024 * int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
        found.anonymous += sizes.get("Pss_Anon", 0)
        found.resident += sizes.get("Pss", 0)
    return found


@contextmanager
def watched(process: psutil.Process, folder: Path) -> Iterator[Peak]:
    """The peak memory of a process, and peak size of a folder, while the block runs."""
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            began = time.monotonic()
            try:
                now = memory_of(process)
            except psutil.Error:
                return
            peak.anonymous, peak.resident = max(peak.anonymous, now.anonymous), max(peak.resident, now.resident)
            peak.disk = max(peak.disk, disk_used(folder))
            stop.wait(max(SAMPLE_SECONDS, (time.monotonic() - began) / SAMPLE_SHARE))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def disk_used(folder: Path) -> int:
    """Bytes on disk under a folder, DVC's cache among them; a file with several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a stage may remove it meanwhile
                status = Path(root, name).lstat()
                seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def run_watched(name: str, command: list[str], folder: Path, records: dict[str, Any]) -> None:
    """Runs a command in a folder and records what it took, unless it is recorded already and has nothing to do.

    Raises:
        UserError: it fails.
    """
    began = time.monotonic()
    with (
        subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True) as process,
        watched(psutil.Process(process.pid), folder) as peak,
    ):
        output, _ = process.communicate()
    if process.returncode:
        raise UserError(f"{name}: failed; its message is above. Mend it and run this again, it goes on from here")
    if f"Stage '{name}' didn't change, skipping" in output:
        if name not in records:  # killed between its end and its record
            run_watched(name, [*command, "--force"], folder, records)
        return
    records[name] = {"seconds": round(time.monotonic() - began, 1), **vars(peak)}
    print(f"{name}: {records[name]['seconds']:.0f} s, {gibibytes(peak.anonymous)} of memory", flush=True)


def moved(adapter: Path) -> float:
    """The largest absolute value in the B factors of an adapter; 0 before its first step."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return max(float(file.get_tensor(name).abs().max()) for name in file.keys() if "lora_B" in name)  # noqa: SIM118


def generate(file: Path) -> int:
    """Loads a GGUF and lets it write; how many tokens."""
    with GgufModel(file, threads=os.cpu_count() or 1, context=64) as model:
        (answer,) = model.generate([model.tokenize("Hello")], NEW_TOKENS)
    return len(answer)


def rehearse(profile: str, layers: int | None, pairs: int | None, folder: Path) -> dict[str, Any]:
    """The whole rehearsal; the content of reports/rehearsal.json.

    Raises:
        UserError: a stage fails, or did not do what it is there for.
    """
    loaded = load(profile)
    options = {"PROFILE": profile, "LAYERS": layers, "PAIRS": pairs}
    all_pairs = loaded.train.batch_size * loaded.train.accumulation
    pairs = pairs or all_pairs
    shape = model_shape(loaded)
    shape = replace(shape, layers=layers or shape.layers)
    path = folder / "records.json"
    records: dict[str, Any] = read_json(path) if path.is_file() else {}
    check_disk(folder, shape)
    prepare(folder, profile, loaded, pairs, shape, needs_weights="fetch_model" not in records)
    for stage in STAGES:
        run_watched(stage, [sys.executable, "-m", "dvc", "repro", "--single-item", stage], folder, records)
        write_json(path, records)
        if stage == "fetch_model":  # models/base is a copy
            shutil.rmtree(folder / "random-model", ignore_errors=True)
    if not (largest := moved(folder / "models/adapter")):
        raise UserError("train: the step left the adapter's B factors at zero, so the merge proves nothing")
    command = [sys.executable, "-m", "tools.rehearse", "--generate", f"models/gguf/{TYPE}.gguf"]
    run_watched("generate", command, folder, records)
    write_json(path, records)
    return {
        "profile": profile,
        "command": " ".join(["make rehearse", *(f"{key}={value}" for key, value in options.items() if value)]),
        "cores": os.cpu_count(),
        "has_bfloat16": has_bfloat16(),
        "shape": vars(shape),
        "weights": shape.linear_weights + shape.other_weights,
        "pairs": pairs,
        "pairs_of_profile": all_pairs,
        "largest_b": largest,
        "stages": records,
        "merge": read_json(folder / "models/merged/merge.json"),
        "tokens": read_json(folder / "reports/data.json")["train"]["tokens"],
    }


def markdown(found: dict[str, Any]) -> str:
    """The page of reports/rehearsal.md."""
    shape, records = found["shape"], found["stages"]
    weights, b = found["weights"] / 1e9, found["largest_b"]
    cpu = f"{found['cores']} cores {'with' if found['has_bfloat16'] else 'without'} bfloat16"
    lines = [
        f"# Rehearsal of the profile {found['profile']}",
        "",
        f"`{found['command']}` on {cpu}: {weights:.2f} billion random weights ({shape['layers']} layers, hidden size "
        f"{shape['hidden']}, vocabulary {shape['vocabulary']:,}), one optimizer step of {found['pairs']} of the profile's "
        f"{found['pairs_of_profile']} pairs, merge, GGUF {TYPE}, and {NEW_TOKENS} tokens written by it. Memory of its own is what no "
        "file backs; resident also counts the pages of files that a process has mapped. They are the largest that was seen, looking "
        "every half second, and where that takes long more seldom.",
        "",
        "| stage | minutes | memory of its own, GiB | resident, GiB | most disk, GiB |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in (*STAGES, "generate"):
        record = records[name]
        cells = (record["seconds"] / 60, *(record[key] / 2**30 for key in ("anonymous", "resident", "disk")))
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in cells) + " |")
    lines += [
        "",
        f"Disk counts DVC's cache and the random weights themselves. After the step the adapter's B factors reach {b:.2g}; rounding "
        f"to bfloat16 swallowed {found['merge']['swallowed']:.1%} of the changes that it made to the weights.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.rehearse", description="Run a profile on random weights.")
    parser.add_argument("--profile", default="a40")
    parser.add_argument("--layers", type=positive, help="fewer decoder layers than the model has")
    parser.add_argument("--pairs", type=positive, help="fewer pairs in the optimizer step than the profile has")
    parser.add_argument("--generate", type=Path, metavar="GGUF", help=argparse.SUPPRESS)
    given = parser.parse_args()
    try:
        if given.generate:
            if (count := generate(given.generate)) != NEW_TOKENS:
                raise UserError(
                    f"{given.generate}: wrote {count} tokens and ended its answer, where {NEW_TOKENS} are asked"
                )
            return
        name = "-".join(str(part) for part in (given.profile, given.layers, given.pairs) if part)
        folder = scratch_folder("rehearsal") / name
        found = rehearse(given.profile, given.layers, given.pairs, folder)
    except UserError as error:
        sys.exit(f"rehearse: {error}")
    except KeyboardInterrupt:
        sys.exit("rehearse: interrupted; run this again, it goes on from here")
    target = (folder / "reports" if given.layers else REPORTS) / f"rehearsal{f'-{given.pairs}' if given.pairs else ''}"
    write_json(target.with_suffix(".json"), found)
    with complete_file(target.with_suffix(".md")) as path:
        path.write_text(markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
