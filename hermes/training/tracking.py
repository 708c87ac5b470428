"""Weights & Biases, optional and harmless: on by `wandb.enabled`, and never the reason why a run fails or waits.

A run is always logged into a folder. With WANDB_API_KEY a process of its own sends that folder when training has ended, and has
`SECONDS` for it. What was not sent stays, for `wandb sync`. So a server that is away, slow or refuses costs that time once, and no log.
"""

import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment

from hermes import params
from hermes.artifacts import scratch_folder
from hermes.console import printable, warn
from hermes.settings.untracked import TrackingSettings

SECONDS = 20
# Neither what the terminal shows, nor git's remote, nor the host's name, paths, packages and load.
QUIET: dict[str, Any] = {
    "console": "off",
    "silent": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
NO_TELEMETRY = {"WANDB_ERROR_REPORTING": "false"}  # which wandb sends to the server even of a run that is offline


class Params(params.Params):
    """The untracked `wandb` key of params.yaml."""

    wandb: TrackingSettings


class Tracking:
    """A W&B run, or nothing at all; the first failure ends the logging with one line and not the training."""

    def __init__(self, run: Any = None) -> None:
        self.run = run

    @classmethod
    def start(cls, config: dict[str, Any]) -> "Tracking":
        """Starts a run as params.yaml says; numbers and `config` are logged, and nothing of the machine (`QUIET`)."""
        settings = params.load(Params).wandb
        if not settings.enabled:
            return cls()
        try:
            folder = scratch_folder("wandb")
            folder.mkdir(parents=True, exist_ok=True)
            with patch_environment(WANDB_MODE="offline", **NO_TELEMETRY):
                import wandb  # slow to import, so only where it is on

                quiet = wandb.Settings(**QUIET)
                return cls(wandb.init(project=settings.project, config=config, dir=str(folder), settings=quiet))
        except Exception as error:
            tell(f"is off: {error}")
            return cls()

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs the numbers of one step."""
        if self.run is None:
            return
        try:
            self.run.log(dict(values), step=step)
        except Exception as error:
            tell(f"stopped logging: {error}")
            self.run = None

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if self.run is None:
            return
        try:
            folder = Path(self.run.settings.sync_dir)
            self.run.finish()
            if os.environ.get("WANDB_API_KEY") and kind is None:
                tell(f"has the run in {folder}" if send(folder) else f"did not take the run; {later(folder)}")
            else:
                tell(f"keeps the run in a folder; {later(folder)}")
        except Exception as error:
            tell(f"did not finish: {error}")


def send(folder: Path) -> bool:
    """Whether W&B took a finished run in time; wandb marks such a run, since its exit code is 0 also where the server refuses."""
    command = [sys.executable, "-m", "wandb", "sync", folder.name]
    with subprocess.Popen(
        command,
        cwd=folder.parent,
        env=os.environ | NO_TELEMETRY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # wandb starts a process of its own
    return any(folder.glob("*.wandb.synced"))


def later(folder: Path) -> str:
    """How to send a run's folder by hand."""
    return f"to send it: .venv/bin/wandb sync {shlex.quote(str(folder))}"


def tell(text: str) -> None:
    """One line for the terminal."""
    warn(f"W&B {printable(text)}")
