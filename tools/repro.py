"""Brings every result up to date: `dvc repro`, under another profile where one is asked for.

    python -m tools.repro                              (or: make repro)
    python -m tools.repro --profile a40                (or: make repro PROFILE=a40)
    python -m tools.repro --dry train                  what it does not know goes to `dvc repro`
    python -m tools.repro -S beta=0.05 train           or to `dvc exp run`, where a value is changed (make train BETA=0.05)

DVC reads the profile from params.yaml, so another one has to stand there while DVC runs. It must not stay: the next
plain `dvc repro` would start the big run. So the file's bytes are kept in .scratch first and put back at the end,
however the run ended; after a kill -9 the next start puts them back. The exit code is DVC's.

A folder that the profile names as its source is no dependency in dvc.yaml. Where it has changed, its stage runs first (tools/sources.py).
"""

import argparse
import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from huggingface_hub.errors import HfHubHTTPError
from pydantic import BaseModel, Field
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hermes import hub, params
from hermes.artifacts import read_json
from hermes.console import UserError, say, warn
from hermes.evaluation import benchmarks
from hermes.run import run_tool
from tools import compare_published, doctor, provenance, sources, verify
from tools.dvc_runs import DVC, SCRATCH, Relay, environment, only_one
from tools.profiles import put_back, selected

GPQA, PUNKT = "Idavidrein/gpqa", "tokenizers/punkt_tab"
CLOSED = (401, 403, 404)  # what the Hub answers where a repository is not for this user
KILLS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))
LOCK, METRICS, REPORT = Path("dvc.lock"), Path("reports/metrics.json"), Path("reports/report.html")
BROKEN = "dvc.lock.broken"
HELD = Path(".dvc/tmp/rwlock")  # which process of DVC reads or writes which path
WHOLE_GRAPH = {"-f", "--force", "-q", "--quiet", "-v", "--verbose"}  # with these a finished run is a new report


def headline(metrics: dict[str, Any]) -> str:
    """The result in one line, from reports/metrics.json."""
    if "strict_gain" not in metrics:
        preference = metrics.get("preference_accuracy", {})
        told = [f"preference accuracy of {name}: {value:.1%}" for name, value in preference.items()]
        for name, gain in metrics.get("suites_gain", {}).items():
            told.append(f"{name} {gain['points']:+.1f} points, 95% interval {gain['low']:+.1f} to {gain['high']:+.1f}")
        return "; ".join(told)
    accuracy, gain = metrics["strict_accuracy"], metrics["strict_gain"]
    return (
        f"strict accuracy: base {accuracy['base']:.1%}, merged {accuracy['merged']:.1%}; "
        f"gain {gain['points']:+.1f} points, "
        f"95% interval {gain['low']:+.1f} to {gain['high']:+.1f}, n = {gain['n']}"
    )


def check_cuda() -> None:
    """Refuses, by a UserError, to run beside a GPU that torch cannot use: every stage would fall back to the CPU and take weeks."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode:
        raise UserError(
            f"torch cannot use the GPU: {doctor.gpu_problem()}; nothing was started (DEVICE=cpu make repro runs on the CPU)"
        )


def check_plan(profile: str | None) -> None:
    """Refuses, by a UserError, a profile that does not fit the GPU or the disk here; tools/plan.py has said why."""
    command = [sys.executable, "-m", "tools.plan", "--quiet", "--disk", *(["--profile", profile] if profile else [])]
    if subprocess.run(command, check=False).returncode:
        raise UserError("nothing was started; `make plan` shows what the run needs")


def prepare_suites(last: str) -> None:
    """Gets what benchmark suites need beside .venv up to the stage `last`, before hours are spent; a UserError where it cannot."""
    tree = params.read_yaml(params.PARAMS)
    profile = tree["profiles"][params.selected_profile(tree)]
    try:
        wanted = list(profile.get("data", {}).get("decontaminate", ()))
        if last == "evaluate":
            wanted += profile.get("evaluate", {}).get("suites", ())
    except (AttributeError, TypeError):
        raise UserError(
            f"{params.PARAMS}: `data.decontaminate` and `evaluate.suites` have to be lists; "
            "`.venv/bin/python -m tools.check_params` says what else is wrong"
        ) from None
    runs = benchmarks.runs([name for name in wanted if name in benchmarks.SUITES])
    if any(benchmarks.needs_math(run.task) for run in runs) and subprocess.run(["./setup.sh", "math"]).returncode:
        raise UserError(
            "./setup.sh math failed; see above, or take open_llm_v2 out of `data.decontaminate` and `evaluate.suites`"
        )
    if "open_llm_v2" in wanted and not is_up_to_date(last):
        check_gpqa()
        prepare_punkt()


def is_up_to_date(stage: str) -> bool:
    """Whether DVC would run neither a stage nor any before it."""
    command = [*DVC, "status", "--quiet", "--with-deps", stage]
    return subprocess.run(command, env=environment(), capture_output=True, check=False).returncode == 0


def check_gpqa() -> None:
    """Refuses, by a UserError, where the Hub says no to GPQA, whose licence is accepted by hand; without a network it may be here."""
    why = hub.why_closed(GPQA, "dataset")
    if isinstance(why, HfHubHTTPError) and why.response.status_code in CLOSED:
        raise UserError(f"the suite open_llm_v2 asks for {hub.failure(why, GPQA, 'main')}; nothing was started")


def prepare_punkt() -> None:
    """Downloads what IFEval splits sentences with, where it is not here, as lm-eval would hours later; a UserError where it cannot."""
    import nltk  # takes a second, and most runs have no suites

    try:
        nltk.data.find(PUNKT)
    except LookupError:
        if not nltk.download("punkt_tab", quiet=True):
            raise UserError(
                "the suite open_llm_v2 asks for NLTK's punkt_tab, which cannot be downloaded; check the network, "
                "or unpack it to ~/nltk_data/tokenizers; nothing was started"
            ) from None


class Held(BaseModel, strict=True):
    """A dependency or an out of dvc.lock."""

    path: str
    hash: str = "md5"
    md5: Annotated[str, Field(min_length=3)] | Annotated[int, Field(ge=100)] | None = None  # as DVC takes it
    size: int = 0
    nfiles: int = 0
    isexec: bool = False


class Recorded(BaseModel):
    """A stage of dvc.lock, as far as DVC insists on it."""

    cmd: str | list[str]
    deps: list[Held] = []
    params: dict[str, dict[str, Any]] = {}
    outs: list[Held] = []


class LockFile(BaseModel):
    """A dvc.lock."""

    version: Literal["2.0"] = Field(alias="schema")
    stages: dict[str, Recorded] = {}


def mend_lock() -> None:
    """Takes back the committed dvc.lock where DVC cannot read the one here, as after a kill while it wrote that.

    Stages that had finished come back from DVC's cache of runs, but for a few that take seconds. What has the marks of a git conflict is
    left to its owner.
    """
    try:
        text = LOCK.read_text() if LOCK.is_file() else None  # an empty one is refused by DVC
        if text is not None and "<<<<<<<" not in text:
            LockFile.model_validate(YAML(typ="safe").load(text))
    except (YAMLError, ValueError):  # pydantic's, or of what is no text
        committed = doctor.git(Path.cwd(), "show", f"HEAD:{LOCK}")
        LOCK.replace(SCRATCH / BROKEN)
        if committed is not None:
            LOCK.write_text(committed)
        instead = "nothing" if committed is None else "the committed one"
        warn(
            f"repro: DVC cannot read {LOCK}, as after a kill while it wrote that; it is {SCRATCH / BROKEN} now, and {instead} is in its "
            "place. Long stages that had finished come from DVC's cache"
        )


def mend_held() -> None:
    """Deletes DVC's list of the paths in use where a kill left it cut off; every later `dvc repro` would fail at it.

    DVC writes it in place, and holds a lock meanwhile, which this takes first.
    """
    if not HELD.is_file():
        return
    with HELD.with_name("rwlock.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            json.loads(HELD.read_bytes())
        except ValueError:
            HELD.unlink()
            warn(f"repro: DVC cannot read {HELD}, as after a kill while it wrote that; it is deleted")


def repro(profile: str | None, rest: Sequence[str], changes: Sequence[str] = ()) -> int:
    """Runs `dvc repro` with the arguments `rest` under a profile, or `dvc exp run` with changed values; DVC's exit code."""
    with only_one("repro") as lock, Relay() as relay:
        if put_back():
            warn(f"repro: {params.PARAMS} is as it was before a run that was killed")
        mend_lock()
        mend_held()
        killed = out_of_memory_kills()
        with selected(profile):
            if doctor.uses_gpu():
                check_cuda()
                check_plan(profile)
            prepare_suites("train" if "train" in rest else "evaluate")
            verb = ["exp", "run", *(f"--set-param={change}" for change in changes)] if changes else ["repro"]
            dry = {"--dry", "-n"} & {*rest}
            for _ in range(2):  # again where DVC brought back what a folder held under these settings before
                code = sources.fetch_changed(relay, lock, *dry) or relay.run([*DVC, *verb, *rest], lock)
                if code or dry or not sources.changed():
                    break
        if code and out_of_memory_kills() > killed:
            warn(
                "repro: the kernel has killed a process for want of memory meanwhile; if it was the stage (`exited with -9`), end other "
                "programs or take a smaller batch, then run the same command again to go on; `make plan` says what it needs"
            )
        return code


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed so far for want of memory, in this container and on this machine."""
    texts = (path.read_text() for path in KILLS if path.is_file())
    return sum(int(count) for text in texts for count in re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE))


def beside_the_published() -> list[str]:
    """How a subset made as the published one differs from it, in sentences, where that is not known yet; why not without the Hub."""
    try:
        return compare_published.compare() if compare_published.is_due() else []
    except UserError as error:
        return [f"not compared with the published pairs: {error}; make compare-published does it later"]


def against_the_commit(profile: str | None = None) -> list[str]:
    """How many outs have the committed bits, and how to get the committed results back where this run's are others.

    The committed bits are those of reports/hashes.json for the profile that ran, the selected one unless named, and these `bits`; or
    else those of dvc.lock.
    """
    committed, hashes = (doctor.git(Path.cwd(), "show", f"HEAD:{path}") for path in (LOCK, verify.HASHES))
    if committed is None or not LOCK.is_file():
        return []
    selected_profile, bits = verify.selected(params.read_yaml(params.PARAMS))
    known = json.loads(hashes or "{}").get(profile or selected_profile, {}).get(bits)
    found = verify.outs(LOCK.read_text())
    outs = known["outs"] if known else verify.outs(committed)
    wanted = {(stage, path): md5 for stage, paths in outs.items() for path, md5 in paths.items()}
    other = [(stage, path) for (stage, path), md5 in wanted.items() if found.get(stage, {}).get(path) != md5]
    lines = [f"{len(wanted) - len(other)} of {len(wanted)} outs have the committed bits"]
    if other:
        stage, path = other[0]
        lines[0] += f"; the first that has not: {path} of {stage}"
        lines.append("to go back to the committed results: git restore dvc.lock reports && .venv/bin/dvc checkout")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.repro",
        allow_abbrev=False,
        description="Bring every result up to date (dvc repro).",
        epilog="Every other option and target goes to DVC.",
    )
    parser.add_argument("--profile", metavar="NAME", help="an entry of `profiles` in params.yaml, for this run only")
    parser.add_argument("-S", "--set-param", metavar="KEY=VALUE", action="append", default=[], help="run an experiment")
    arguments, rest = parser.parse_known_args()
    code = repro(arguments.profile, rest, arguments.set_param)
    if code == 0 and WHOLE_GRAPH.issuperset(rest) and METRICS.exists():
        lines = against_the_commit(arguments.profile)
        say("", headline(read_json(METRICS)), f"report: {REPORT}", *lines)
        if LOCK.is_file() and (
            len(lines) != 1 or not provenance.PROVENANCE.is_file()
        ):  # others than the committed results
            provenance.write(["make", "repro", *(f"PROFILE={name}" for name in [arguments.profile] if name)])
        for line in beside_the_published():
            say(line)
    return code


if __name__ == "__main__":
    run_tool("repro", main)
