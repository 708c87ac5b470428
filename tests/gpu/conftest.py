"""What a CPU cannot try, tried on the GPU that is here: the device of the checks, a table at the end, a record after each.

    python -m pytest -m gpu tests/gpu                      (or: make gpu-check) about ten minutes on an H100
    python -m pytest -m gpu tests/gpu --gpu-device cpu     the checks themselves, on tiny models

Models are random and of a known shape, pairs are random and easy to tell apart. What is compared is the project's own code: its
loading, forward, trainer, stages and predictions. reports/gpu-check.json is the record of a GPU to commit; that of a CPU goes to
the scratch folder. In a run of other tests, from which tests/conftest.py hides a GPU, the checks are deselected.
"""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from hermes.artifacts import scratch_folder, write_json

REPORT = Path("reports/gpu-check.json")
PACKAGES = ("torch", "bitsandbytes", "llama-cpp-python", "transformers", "trl", "peft", "accelerate")
VERDICTS = {"passed": "pass", "failed": "fail", "skipped": "skip"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the checks themselves")


def pytest_configure(config: pytest.Config) -> None:
    name = chosen_device(config)
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stages take a GPU where there is one
    elif name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("gpu-check: no CUDA device here; --gpu-device cpu tries the checks themselves")
    if name:
        scratch = scratch_folder("gpu-check")
        scratch.mkdir(parents=True, exist_ok=True)
        config.option.basetemp = scratch / "folders"  # beside the checkout, since a model of a check takes gigabytes
        target = REPORT.absolute() if name == "cuda" else scratch / "cpu.json"
        config.pluginmanager.register(Record(target, machine(name)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if chosen_device(config) is None:
        checks = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in checks]
        config.hook.pytest_deselected(items=checks)


def chosen_device(config: pytest.Config) -> str | None:
    """The device that the command line chose; None in a run of other tests, whose root is not this folder."""
    return config.getoption("gpu_device") if config.rootpath == Path(__file__).parent else None


def machine(device: str) -> dict[str, str]:
    """What the numbers were found on: GPU, driver, and the versions that matter."""
    from tools.doctor import present_gpu

    found = {"device": device, **{name: metadata.version(name) for name in PACKAGES}}
    if device == "cuda":
        gpu, properties = present_gpu(), torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "memory": f"{properties.total_memory / 2**30:.2f} GiB",
            "capability": f"{properties.major}.{properties.minor}",
            "gpus": str(torch.cuda.device_count()),
            "driver": gpu.driver if gpu else "unknown",
            "cuda": str(torch.version.cuda),
        }
    return found


class Record:
    """The verdict and finding of each check: a file after every one, so that a run cut short leaves what it found, and a table."""

    def __init__(self, target: Path, found_on: dict[str, str]) -> None:
        self.target, self.machine = target, found_on
        self.lines: list[dict[str, Any]] = []
        self.left: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.left = [readable(item.nodeid) for item in session.items]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        name, properties = readable(report.nodeid), dict(report.user_properties)
        line = {"name": name, "verdict": VERDICTS[report.outcome], "numbers": properties.get("numbers", {})}
        self.lines.append(line | {"finding": properties.get("finding") or reason(report)})
        self.left = [other for other in self.left if other != name]
        write_json(self.target, {"machine": self.machine, "lines": self.lines, "left": self.left})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        shutil.rmtree(session.config.option.basetemp, ignore_errors=True)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"gpu-check: {self.machine.get('gpu', 'CPU')}, {self.target}")
        width = max((len(line["name"]) for line in self.lines), default=0)
        for line in self.lines:
            terminalreporter.write_line(f"{line['name']:<{width}}  {line['verdict']}  {line['finding']}")


def readable(node: str) -> str:
    """The name of a check: that of its test in words."""
    return node.rpartition("::")[2].removeprefix("test_").replace("_", " ")


def reason(report: pytest.TestReport) -> str:
    """Why a check was skipped or ended by an error, in a line; with the last line that a program it started wrote."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    written = report.capstderr.strip().splitlines()[-1:]
    return "; ".join([str(getattr(report.longrepr, "reprcrash", report.longrepr)).strip(), *written])


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    """The device of the checks, with torch set as the stages set it."""
    from hermes.model.base import set_determinism  # imports bitsandbytes, which looks for a GPU

    set_determinism(threads=2)
    return torch.device(pytestconfig.getoption("gpu_device"))


@pytest.fixture
def found(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """What a check says that it found, in words and with the numbers behind them, before it asserts on them."""

    def say(finding: str, **numbers: float) -> None:
        record_property("finding", finding)
        record_property("numbers", numbers)

    return say


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    """Gives back what a check held of the GPU."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
