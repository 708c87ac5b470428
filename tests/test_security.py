"""What SECURITY.md promises of the code, read from the code: no pickle, no code of others, no shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_graph import MODULES

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "runpy"}
RUNS_TEXT = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "torch.load",
    "torch.hub.load",
}
CODELESS = {"GenerationConfig", "PeftModel"}  # these have no `trust_remote_code` to say no to


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """The calls of a module, by the dotted name of what is called."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(one.value) for one in call.keywords if one.arg == name), None)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_reads_no_pickle_and_runs_no_text(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not imported & PICKLES
    for name, call in calls(MODULES[module]):
        assert name not in RUNS_TEXT, (module, name, call.lineno)
        assert keyword(call, "shell") in (None, "False"), (module, name, call.lineno)
        assert keyword(call, "allow_pickle") in (None, "False"), (module, name, call.lineno)
        assert keyword(call, "trust_remote_code") in (None, "False"), (module, name, call.lineno)


def loose(path: Path) -> list[str]:
    """The calls of a module that may run a model's own code, or take a folder that is missing for a name at the Hub."""
    found = []
    for name, call in calls(path):
        loader, _, method = name.rpartition(".")
        if method not in ("from_pretrained", "from_config"):
            continue
        hub = path == MODULES["tools/plan.py"] and keyword(call, "revision") is not None
        local = method == "from_config" or hub or keyword(call, "local_files_only") == "True"
        if not local or (loader not in CODELESS and keyword(call, "trust_remote_code") != "False"):
            found.append(f"{name}, line {call.lineno}")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_model_or_tokenizer_is_loaded_from_its_folder_without_code_of_its_own(module: str) -> None:
    assert loose(MODULES[module]) == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_chat_template_is_rendered_in_one_place(module: str) -> None:
    found = [name for name, _ in calls(MODULES[module]) if name.endswith("apply_chat_template")]
    assert not found or module == "hermes/data/chat_template.py"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_is_shown_is_escaped(module: str) -> None:
    """Names of columns, profiles, files and tokens come from others, and hermes.console spells out what steers a terminal."""
    if module in (
        "hermes/console.py",
        "tools/doctor.py",
    ):  # doctor runs without packages, and escapes its checks itself
        return
    for name, call in calls(MODULES[module]):
        assert name not in ("print", "sys.stdout.write", "sys.stderr.write", "traceback.print_exc"), (
            module,
            call.lineno,
        )
        if name == "sys.exit" and any(isinstance(node, ast.JoinedStr) for node in ast.walk(call)):
            assert "printable(" in ast.unparse(call), (module, call.lineno)


def test_the_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\nAutoModel.from_pretrained(x, trust_remote_code=True)\nsubprocess.run(x, shell=True)\neval(x)\n"
    )
    assert loose(path) == ["AutoModel.from_pretrained, line 2"]
    found = dict(calls(path))
    assert set(found) == {"AutoModel.from_pretrained", "subprocess.run", "eval"}
    assert keyword(found["AutoModel.from_pretrained"], "trust_remote_code") == "True"
    assert keyword(found["subprocess.run"], "shell") == "True"


@pytest.mark.parametrize(
    ("call", "is_loose"),
    [
        ("AutoTokenizer.from_pretrained(x)", True),
        ("AutoTokenizer.from_pretrained(x, local_files_only=True)", True),
        ("PreTrainedConfig.from_pretrained(x, trust_remote_code=False)", True),
        ("GenerationConfig.from_pretrained(x)", True),
        ("GenerationConfig.from_pretrained(x, local_files_only=True)", False),
        ("AutoConfig.from_pretrained(x, revision=y, trust_remote_code=False)", True),
        ("AutoConfig.from_pretrained(x, local_files_only=True, trust_remote_code=False)", False),
        ("AutoModel.from_config(x)", True),
        ("AutoModel.from_config(x, trust_remote_code=False)", False),
    ],
)
def test_the_scan_knows_a_loose_load(call: str, is_loose: bool, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(f"{call}\n")
    assert bool(loose(tmp_path / "module.py")) == is_loose
