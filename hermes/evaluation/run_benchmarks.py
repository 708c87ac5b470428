"""Tasks of lm-eval on a model that is loaded here, one at a time, each kept in the scratch as soon as it is done.

The numbers of a suite (benchmarks.py) are held against published ones. So text is treated as lm-eval does, and not as in a chat
(chat_models.py): a choice is tokenized with its prompt and has no end token, and an answer ends at the task's own texts. A prompt that is
too long loses its beginning, and is counted. Prompts, batches and seeds depend on the arguments and on the kind of device alone.
"""

import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from hermes.artifacts import complete_file, sha256_file, sha256_folder, write_json
from hermes.console import UserError, say
from hermes.evaluation import suite_tasks
from hermes.evaluation.benchmarks import Run
from hermes.evaluation.chat_models import ChatModel, Ids, TokenizedModel
from hermes.params import read_yaml
from hermes.settings.evaluate import Batching

Opened = Callable[[], AbstractContextManager[ChatModel]]
ROOT, NOUS = Path(__file__).parents[2], "hermes/evaluation/tasks/nous"
# The modules and the lock that results depend on; what else these import shapes no number. A suite reaches a result through its run alone.
CODE = (
    "bits",
    "evaluation/run_benchmarks",
    "evaluation/suite_tasks",
    "evaluation/chat_models",
    "evaluation/greedy",
    "evaluation/oracle",
    "evaluation/choices",
    "evaluation/vllm_chat",
    "evaluation/vllm_worker",
    "model/gguf",
    "model/base",
    "training/exactness",
    "training/shared_prefix",
    "training/packing",
    "training/row_attention",
    "training/answer_scores",
    "data/chat_template",
    "data/chat_text",
    "data/prefixes",
)
MATH_LOCK, VLLM_LOCK, PINS = "requirements-math.lock", "requirements-vllm.lock", "hermes/evaluation/revisions.yaml"
LONGEST_ANSWER = 256  # lm-eval's own, in tokens, where a task names none
# A metric that lm-eval gives one second of the clock, so that equal runs differ; no suite counts it, and results and logs leave it out.
TIMED = {"exact_match_original"}
# What a log keeps of a question beside the metrics: all but the prompt, which question and seed make again, and the hash proves.
LOGGED = ("doc_id", "doc", "target", "resps", "filtered_resps", "filter", "prompt_hash")


class SuiteModel(TokenizedModel):
    """The weights of a chat model behind lm-eval's own treatment of text.

    A prompt and its answer have `context` tokens at most; `truncated` counts the requests that were longer.
    """

    def __init__(self, chat: ChatModel, context: int) -> None:
        super().__init__(chat.tokenizer)
        self.chat, self.context, self.truncated = chat, context, 0
        self.ends = {self.eot_token_id, chat.tokenizer.eos_token_id}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """The ids of a text with what the tokenizer adds to one, unless a template wrote that already."""
        begun = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)
        added = not begun if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=added)["input_ids"]

    def fitting(self, prompt: Ids, answer: int) -> Ids:
        """The end of a prompt that leaves room for so many tokens of an answer.

        Raises:
            UserError: there is no room for a prompt.
        """
        room = self.context - answer
        if room < 1:
            raise UserError(
                f"params.yaml: `evaluate.context` ({self.context}) leaves no room beside an answer of {answer} tokens"
            )
        self.truncated += len(prompt) > room
        return prompt[-room:]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Ids, Ids]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        fitted = [(texts, self.fitting(prompt, len(answer)), answer) for texts, prompt, answer in requests]
        return self.chat._loglikelihood_tokens(fitted)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the task's own stops, which all requests of a task share."""
        options = requests[0].args[1]
        if options.get("do_sample") or any(request.args[1] != options for request in requests):
            raise ValueError("a suite's task asks for one greedy answer a question")
        until, limit = [text for text in options["until"] if text], options.get("max_gen_toks", LONGEST_ANSWER)

        def stopped(answer: Ids) -> bool:
            """Whether the last token ends the answer, or completes one of the texts that stop it.

            A text of n bytes has at most n tokens, so that only the last n tokens need to be read.
            """
            ended = (text in self.tokenizer.decode(answer[-len(text.encode()) :]) for text in until)
            return answer[-1] in self.ends or any(ended)

        self.chat.max_new_tokens, self.chat.stopped = limit, stopped
        self.chat.until, self.chat.until_ids = until, self.ends
        found = self.chat.generate([self.fitting(self.tok_encode(request.args[0]), limit) for request in requests])
        answers = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]
        for text in until:
            answers = [answer.split(text)[0] for answer in answers]
        return answers


def measured(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The values of each metric over the questions, by `metric,filter`; each value of a list counts."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for metric in sample["metrics"]:
            found = sample[metric] if isinstance(sample[metric], list) else [sample[metric]]
            values[f"{metric},{sample['filter']}"] += map(float, found)
    return dict(values)


def digest(samples: Sequence[Mapping[str, Any]]) -> str:
    """A hash of questions, answers that count as right, and prompts: models whose results are compared have the same."""
    hashes = [(sample["doc_hash"], sample["prompt_hash"]) for sample in samples]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


def run_task(run: Run, task: Task, model: SuiteModel) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Asks a model every question of a task: (the result in numbers, the rows of its log in the order of the questions).

    Neither depends on what ran before, so that a run which goes on ends as one that was never killed; nor on the clock, but for the limit
    of math-verify.
    """
    suite_tasks.seed()
    model.truncated = 0
    found = evaluate(
        lm=model,
        task_dict={"tasks": {run.task: task}, "groups": {}, "group_map": {}},
        apply_chat_template=run.chat,
        fewshot_as_multiturn=run.chat,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = [
        sample | {"metrics": [metric for metric in sample["metrics"] if metric not in TIMED]}
        for sample in sorted(found["samples"][run.task], key=lambda sample: (sample["filter"], sample["doc_id"]))
    ]
    result = {
        "n": len({sample["doc_id"] for sample in samples}),
        "metrics": measured(samples),
        "truncated": model.truncated,
        "revision": suite_tasks.revision(task),
        "questions": digest(samples),
    }
    return result, [{name: sample[name] for name in (*LOGGED, *sample["metrics"])} for sample in samples]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as gzipped JSON lines; equal rows give equal bytes under one zlib."""
    with complete_file(path) as temporary, gzip.GzipFile(temporary, "wb", mtime=0) as file:
        for one in rows:
            file.write(json.dumps(one, ensure_ascii=False, sort_keys=True, default=str).encode() + b"\n")


def device_name() -> str:
    """The GPU with its memory in bytes, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.name} {found.total_memory}"


def folder_name(model: Path, batching: Batching, dtype: torch.dtype) -> str:
    """A hash of all that the results of a model depend on beside the task: its bits and type, the batches, code and package versions.

    A suite's tasks say themselves how long an answer may be, so `max_new_tokens` is not among it.
    """
    tasks = sorted(path.name for path in (ROOT / NOUS).iterdir() if path.is_file())
    files = [*(f"hermes/{name}.py" for name in CODE), MATH_LOCK, VLLM_LOCK, PINS, *(f"{NOUS}/{name}" for name in tasks)]
    named = read_yaml(ROOT / "dvc.yaml")["stages"]["evaluate"]["params"]
    packages = next(entry["packages.yaml"] for entry in named if isinstance(entry, dict))
    versions = read_yaml(ROOT / "packages.yaml")
    inputs = {
        "model": sha256_folder(model) if model.is_dir() else sha256_file(model),
        "dtype": str(dtype),
        "device": device_name(),  # by whose memory a batch is sized
        "batching": batching.model_dump(include=set(Batching.model_fields) - {"max_new_tokens"}),
        "files": {file: sha256_file(ROOT / file) for file in files},
        "packages": {name: versions[name] for name in packages},
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def run_all(
    runs: Sequence[Run],
    folder: Path,
    open_model: Opened,
    context: int,
    open_written: Opened | None = None,
) -> None:
    """Runs what a folder does not hold yet; two files a run: LABEL.jsonl.gz, its log, and then LABEL.json, its result.

    The data of all tasks are fetched before the model is loaded, so that a missing one costs nothing.

    Args:
        runs: tasks, each with its number of examples.
        folder: where results are kept.
        open_model: gives the model.
        context: tokens of a prompt and its answer at most.
        open_written: gives what writes the answers of generation tasks, if it is another.

    Raises:
        UserError: something is missing (`load_tasks`).
    """
    missing = [run for run in runs if not (folder / f"{run.label}.json").is_file()]
    if not missing:
        return
    waiting = suite_tasks.load_tasks(missing)
    written = [one for one in waiting if open_written and one[1].OUTPUT_TYPE == "generate_until"]
    scored = [one for one in waiting if one not in written]
    for part, opened in ((scored, open_model), (written, open_written)):
        if not part or not opened:
            continue
        with opened() as chat:
            model = SuiteModel(chat, context)
            for number, (run, task) in enumerate(part, start=1):
                (locks := folder.with_name(f"{folder.name}.locks")).mkdir(parents=True, exist_ok=True)
                with FileLock(locks / run.label):  # another experiment may ask the same model
                    if (folder / f"{run.label}.json").is_file():
                        continue
                    say(f"  {run.label}, {number} of {len(part)}")
                    result, rows = run_task(run, task, model)
                    write_rows(folder / f"{run.label}.jsonl.gz", rows)
                    write_json(folder / f"{run.label}.json", result)
