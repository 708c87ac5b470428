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
# A configuration holds no code; PEFT looks for a folder first, and is given this project's own.
LOADERS_WITHOUT_CODE = {"GenerationConfig"}
ELSEWHERE = {("stages/evaluate.py", "PeftModel")}


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


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_model_or_tokenizer_is_loaded_without_code_of_its_own(module: str) -> None:
    for name, call in calls(MODULES[module]):
        loader, _, method = name.rpartition(".")
        if method in ("from_pretrained", "from_config") and (module, loader) not in ELSEWHERE:
            code = loader in LOADERS_WITHOUT_CODE or keyword(call, "trust_remote_code") == "False"
            assert code, (module, call.lineno)
            hub = module == "tools/plan.py" and keyword(call, "revision") is not None
            assert hub or method == "from_config" or keyword(call, "local_files_only") == "True", (module, call.lineno)


def test_the_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\nAutoModel.from_pretrained(x, trust_remote_code=True)\nsubprocess.run(x, shell=True)\neval(x)\n"
    )
    found = dict(calls(path))
    assert set(found) == {"AutoModel.from_pretrained", "subprocess.run", "eval"}
    assert keyword(found["AutoModel.from_pretrained"], "trust_remote_code") == "True"
    assert keyword(found["subprocess.run"], "shell") == "True"
