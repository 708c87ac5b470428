"""A profile's run on random weights of its model's exact shape, on whatever machine is here: `make rehearse PROFILE=a40`.

    python -m tools.rehearse --profile a40                 (or: make rehearse PROFILE=a40)
    python -m tools.rehearse --profile a40 --pairs 8       the same with a step of fewer pairs
    python -m tools.rehearse --profile a40 --layers 2 --pairs 4    and with fewer layers, in minutes

It proves what can be proved without the data and the weights: that every stage works at that size, and what memory, disk and time each
takes. It works in a copy of the code, .scratch/rehearsal, whose params.yaml selects the profile. The weights are random, the tokenizer is
Llama-3's own, and the rows are shaped like Hermes' and enough for one optimizer step. DVC runs the stages up to the GGUF and the 4-bit
weights there, which two pairs calibrate; then the GGUF is loaded and writes 8 tokens. The learning rate has no warm-up, so that the step
moves the adapter. GPTQ or AWQ is left out where disk or memory has no room for it.

What has run is not run again: start it again after an interruption. reports/rehearsal.json and .md say what each stage took, rehearsal-8
what it took with a step of 8 pairs. With fewer layers they are in the copy.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from hermes import params
from hermes.artifacts import complete_file, complete_folder, read_json, scratch_folder, write_json, write_parquet
from hermes.console import UserError, printable, say
from hermes.model import llama3
from hermes.model.gguf import GgufModel
from hermes.model.llama3 import Shape
from hermes.model.safetensors_stream import DTYPES, PIECE, Stored, write_folder
from hermes.pages import render
from hermes.run import run_tool
from hermes.settings.compress import Method
from hermes.settings.experiment import Profile
from tools import disk, plan
from tools.dvc_runs import environment
from tools.memory_plan import gibibytes
from tools.plan import Run, changed, device_here, load, model_shape, on_cpu, pair_lengths
from tools.profiles import write_params
from tools.quantization_plan import folder_size, gguf_size, weights_of

ROOT = Path(__file__).parent.parent
REPORTS = Path("reports")
STAGES = ("fetch_data", "fetch_model", "subset", "tokenize", "reference", "train", "merge", "quantize", "compress")
SOURCE = "random-model"
COLUMNS = ("question", "chosen", "rejected")
TYPE, NEW_TOKENS, HELD_OUT, CALIBRATING = "Q4_K_M", 8, 4, 2
FOLDERS = ("hermes", "stages", "tools", "data/embedded")  # that are copied, fetch_data's dependency among them
FILES = ("packages.yaml", "requirements-math.lock", "dvc.yaml", "run-stage", ".dvcignore", ".dvc/config")
RUNNING = re.compile(r"Running stage '(\w+)'")  # as DVC says it, and the program after this line
GENERATE = """print("Running stage 'generate'", flush=True); from tools.rehearse import generate; generate()"""
SAMPLE_SECONDS = 0.5  # between looks at memory and disk


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
        state = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict()
    if shape.tied:
        state.pop("lm_head.weight")
    tensors = [Stored(name, "BF16", tuple(t.shape), folder, 0, 2 * t.numel()) for name, t in sorted(state.items())]
    generator = torch.Generator().manual_seed(0)

    def content(tensor: Stored) -> Iterator[bytes]:
        numbers = tensor.size // 2
        for start in range(0, numbers, PIECE):
            count = min(PIECE, numbers - start)
            values = torch.ones(count) if len(tensor.shape) == 1 else 0.02 * torch.randn(count, generator=generator)
            yield values.to(DTYPES[tensor.dtype]).view(torch.uint8).numpy().tobytes()

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

    def row(i: int) -> dict[str, Any]:
        texts = ("".join(random.choice(words, max(1, tokens[i]))).strip() for tokens in lengths)
        return {**dict(zip(COLUMNS, texts, strict=True)), "delta_score": 2.0 + i / len(lengths.prompt)}

    return [row(i) for i in random.choice(len(lengths.prompt), count)]


def methods_with_room(loaded: Profile, shape: Shape, needed: int) -> tuple[list[Method], dict[str, str]]:
    """The methods of `compress` that memory and disk here can hold beside `needed` bytes on disk, and what each other one lacks."""
    bits = params.read_yaml(params.PARAMS)["bits"]
    device = device_here(loaded.base.threads, bits)[1]
    run = Run(loaded if device.is_gpu else on_cpu(loaded, bits), shape, pair_lengths(loaded)[0])
    kept: list[Method] = []
    lacking: dict[str, str] = {}
    for method in loaded.compress.methods:
        alone = changed(run, {"compress": {"methods": [method], "awq_pairs": CALIBRATING}})
        memory, size = plan.memory_of(alone, device.is_gpu)["compress"], folder_size(loaded, shape)
        if memory > device.memory:
            lacking[method] = f"{gibibytes(memory)} of memory, of which there are {gibibytes(device.memory)}"
        elif disk.room(ROOT, needed + size * (len(kept) + 1))[1]:
            lacking[method] = f"{gibibytes(size)} more on the disk"
        else:
            kept.append(method)
    return kept, lacking


def overrides(loaded: Profile, pairs: int, shape: Shape, methods: list[Method]) -> dict[str, dict[str, Any]]:
    """What the rehearsal sets in the profile: its material, one step that moves the adapter, and this machine's threads."""
    group = loaded.compress.group_size
    divides = group is not None and not any(inputs % group for inputs, _ in shape.linear.values())
    threads = {"threads": os.cpu_count() or 1}
    batch_size = math.gcd(pairs, loaded.train.batch_size)  # so that the step is of all of them
    step = {"batch_size": batch_size, "accumulation": pairs // batch_size, "max_steps": 1}
    columns = {name: name for name in COLUMNS} | {"score": "delta_score", "system": None}
    splits = {"train": "train", "validation": "validation", "test": "validation"}
    rows = {"source": "./rows", "revision": None, "config": None, "format": "plain"}
    return {
        "data": rows | {"columns": columns, "splits": splits, "decontaminate": []},
        "model": {"source": f"./{SOURCE}", "revision": None},
        "subset": {"k": pairs},
        "base": threads,
        "train": step | {"warmup_steps": 0, "warmup_ratio": 0.0, "evaluations": 0},
        "calibration": {"pairs": CALIBRATING},
        "quantize": {"types": [TYPE]},
        "compress": threads | {"methods": methods, "group_size": group if divides else None, "awq_pairs": CALIBRATING},
        "evaluate": {"types": [TYPE]},
    }


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def prepare(folder: Path, profile: str, loaded: Profile, pairs: int, shape: Shape, methods: list[Method]) -> None:
    """Makes the copy that the rehearsal runs in: code, params, rows, and random weights until they are fetched. What is there stays."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir(exist_ok=True)
    for name in FILES:
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    tokenizer = llama3.tokenizer()
    if not (folder / "rows").is_dir():
        with complete_folder(folder / "rows") as rows:
            for split, count, seed in (("train", 2 * pairs, 1), ("validation", HELD_OUT, 2)):
                table = pa.Table.from_pylist(random_rows(loaded, tokenizer, count, seed))
                write_parquet(rows / f"{split}.parquet", table)
    lock = folder / "dvc.lock"
    if lock.is_file() and "fetch_model" in params.read_yaml(lock)["stages"]:  # DVC has a copy
        shutil.rmtree(folder / SOURCE, ignore_errors=True)
    elif not (folder / SOURCE).is_dir():
        say(f"rehearse: writing {weights_of(shape) / 1e9:.2f} billion random weights")
        random_model(folder / SOURCE, shape, tokenizer)
    write_params(ROOT / params.PARAMS, folder / params.PARAMS, profile, overrides(loaded, pairs, shape, methods))


def memory_of(process: psutil.Process) -> tuple[int, int]:
    """Bytes of memory that a process and its children hold now: of their own, and with the files that they mapped."""
    own = resident = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            found = one.memory_info()
            own, resident = own + found.rss - found.shared, resident + found.rss
    return own, resident


def disk_used(folder: Path) -> int:
    """Bytes on disk under a folder, DVC's cache among them; a file with several names counts once."""
    found = subprocess.run(["du", "-sk", folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return 1024 * int(found.stdout.split()[0])  # it says so also where a stage removes a file meanwhile


def run_watched(command: list[str], folder: Path, records: Path) -> None:
    """Runs a command in a folder, and records what each stage takes that its output names; a UserError where it fails.

    The record of a stage is written while it runs, so that one which DVC skips after an interruption has its own.
    """
    found: dict[str, Any] = read_json(records) if records.is_file() else {}
    names: list[str] = []
    output, own = folder / "output.txt", environment() | {"PYTHONUNBUFFERED": "1"}  # so that a name is there at once
    with output.open("w") as file, psutil.Popen(command, cwd=folder, env=own, stdout=file) as process:
        while process.poll() is None:
            for name in RUNNING.findall(output.read_text())[len(names) :]:
                names.append(name)
                began, found[name] = time.monotonic(), {"anonymous": 0, "resident": 0, "disk": 0}
                say(f"rehearse: {name}")
            if "fetch_model" in names[:-1]:  # models/base is a copy
                shutil.rmtree(folder / SOURCE, ignore_errors=True)
            if names:
                record, (anonymous, resident) = found[names[-1]], memory_of(process)
                now = {"anonymous": anonymous, "resident": resident, "disk": disk_used(folder)}
                record |= {key: max(record[key], value) for key, value in now.items()}
                record["seconds"] = round(time.monotonic() - began, 1)
                write_json(records, found)
            time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        name = (RUNNING.findall(output.read_text()) or ["dvc"])[-1]
        raise UserError(f"{name}: failed; its message is above. Mend it and run this again, it goes on from here")


def moved(adapter: Path) -> float:
    """The largest absolute value in the B factors of an adapter; 0 before its first step."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    return max(float(tensor.abs().max()) for name, tensor in tensors.items() if "lora_B" in name)


def generate() -> None:
    """Loads the GGUF and lets it write."""
    file = Path(f"models/gguf/{TYPE}.gguf")
    with GgufModel(file, threads=os.cpu_count() or 1, context=64) as model:
        (answer,) = model.generate([model.tokenize("Hello")], NEW_TOKENS)
    if len(answer) != NEW_TOKENS:
        said = f"rehearse: {file}: wrote {len(answer)} tokens and ended its answer, where {NEW_TOKENS} are asked"
        sys.exit(printable(said))


def rehearse(profile: str, shape: Shape, pairs: int, folder: Path) -> dict[str, Any]:
    """The whole rehearsal, as reports/rehearsal.json has it. A UserError where a stage fails or did not do what it is there for."""
    loaded, records = load(profile), folder / "records.json"
    held = disk_used(folder) if folder.is_dir() else 0
    # base, merged model and f16 GGUF have two bytes a weight
    needed = 3 * 2 * weights_of(shape) + gguf_size(TYPE, shape) - held
    free, mend = disk.room(ROOT, needed)
    if mend:
        raise UserError(f"{free}; {mend}, or use fewer --layers")
    methods, lacking = methods_with_room(loaded, shape, needed)
    say(*(f"rehearse: {method} is left out, since it needs {what}" for method, what in lacking.items()))
    prepare(folder, profile, loaded, pairs, shape, methods)
    run_watched([sys.executable, "-m", "dvc", "repro", *STAGES[-2:]], folder, records)
    if not (largest := moved(folder / "models/adapter")):
        raise UserError("train: the step left the adapter's B factors at zero, so the merge proves nothing")
    run_watched([sys.executable, "-c", GENERATE], folder, records)
    return {
        "profile": profile,
        "cores": os.cpu_count(),
        "bits": params.read_yaml(params.PARAMS)["bits"],
        "shape": vars(shape),
        "weights": weights_of(shape),
        "pairs": pairs,
        "pairs_of_profile": loaded.train.batch_size * loaded.train.accumulation,
        "largest_b": largest,
        "stages": read_json(records),
        "merge": read_json(folder / "models/merged/merge.json"),
        "tokens": read_json(folder / "reports/data.json")["train"]["tokens"],
        "compressed": read_json(folder / "models/compressed/compress.json")["files"],
        "left_out": lacking,
    }


def markdown(found: dict[str, Any]) -> str:
    """The page of reports/rehearsal.md."""
    content = found | {"order": (*STAGES, "generate"), "type": TYPE, "new_tokens": NEW_TOKENS}
    return render.environment().get_template("rehearsal.md.j2").render(content)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.rehearse", description="Run a profile on random weights.")
    parser.add_argument("--profile", default="a40")
    parser.add_argument("--layers", type=positive, help="fewer decoder layers than the model has")
    parser.add_argument("--pairs", type=positive, help="fewer pairs in the optimizer step than the profile has")
    given = parser.parse_args()
    options = {name.upper(): value for name, value in vars(given).items() if value}
    loaded = load(given.profile)
    shape = model_shape(loaded)
    shape = replace(shape, layers=given.layers or shape.layers)
    pairs = given.pairs or loaded.train.batch_size * loaded.train.accumulation
    folder = scratch_folder("rehearsal") / "-".join(map(str, options.values()))
    found = rehearse(given.profile, shape, pairs, folder)
    found["command"] = " ".join(["make rehearse", *(f"{name}={value}" for name, value in options.items())])
    target = (folder / "reports" if given.layers else REPORTS) / f"rehearsal{f'-{given.pairs}' if given.pairs else ''}"
    write_json(target.with_suffix(".json"), found)
    with complete_file(target.with_suffix(".md")) as path:
        path.write_text(markdown(found))
    say(*markdown(found).split("\n"))


if __name__ == "__main__":
    run_tool("rehearse", main)
