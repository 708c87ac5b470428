"""Weights & Biases, optional and harmless: on by `wandb.enabled`, and never the reason why a run fails or waits.

A run is always logged into a folder. With WANDB_API_KEY a process of its own sends that folder when training has ended, and has
`SECONDS` for it. What was not sent stays, for `wandb sync`. So a server that is away, slow or refuses costs that time once, and no log.

An experiment is one run at W&B. Its id is the hash of all that its training depends on. So a resumed training goes on in the run, and the
report adds the evaluation to it. Experiments that differ only after training share the run, and the last report's scores stand there. Files
of data and models are artifacts by hash: W&B holds what they are and what they were made from, and no path of this machine.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

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


class Artifact(NamedTuple):
    """A result of a stage: its name at W&B, `dataset` or `model`, its hash in dvc.lock, and the hashes of what it was made from."""

    name: str
    kind: str
    md5: str
    made_from: Mapping[str, str]


class Tracking:
    """A W&B run, or nothing at all; the first failure ends the logging with one line and not the training."""

    def __init__(self, run: Any = None) -> None:
        self.run = run

    @classmethod
    def start(cls, config: dict[str, Any], run_id: str | None = None) -> "Tracking":
        """Starts a run as params.yaml says, or goes on in the one of this id; nothing of the machine is logged (`QUIET`)."""
        settings = params.load(Params).wandb
        if not settings.enabled:
            return cls()
        try:
            folder = scratch_folder("wandb")
            folder.mkdir(parents=True, exist_ok=True)
            with patch.dict(os.environ, WANDB_MODE="offline", **NO_TELEMETRY):
                import wandb  # slow to import, so only where it is on

                quiet = wandb.Settings(**QUIET)
                return cls(
                    wandb.init(
                        project=settings.project,
                        id=run_id,
                        config=config,
                        dir=str(folder),
                        settings=quiet,
                        resume="allow",
                    )
                )
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

    def results(
        self,
        step: int,
        metrics: Mapping[str, float],
        answers: tuple[Sequence[str], Sequence[Sequence[Any]]],
        figures: Sequence[Path],
        artifacts: Sequence["Artifact"],
    ) -> None:
        """Logs what an evaluation found, behind the last step of training.

        Args:
            step: the one to log figures and answers at.
            metrics: numbers by name, for the run's summary.
            answers: the columns and rows of a table.
            figures: PNG files.
            artifacts: what was trained on and made.
        """
        if self.run is None:
            return
        try:
            import wandb

            self.run.summary.update(dict(metrics))
            columns, rows = answers
            pictures = {f"figures/{path.stem}": wandb.Image(str(path)) for path in figures}
            table = {"answers": wandb.Table(columns=list(columns), data=[list(row) for row in rows])} if rows else {}
            self.run.log(pictures | table, step=step)
            for made in artifacts:
                entry = wandb.Artifact(
                    made.name, type=made.kind, metadata={"md5": made.md5, "made_from": dict(made.made_from)}
                )
                entry.add_reference(f"dvc://md5/{made.md5}", name=made.name, checksum=False)
                self.run.log_artifact(entry)
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
            parts = sorted(folder.parent.glob(f"offline-run-*-{self.run.id}*"))  # one more where a training was resumed
            if os.environ.get("WANDB_API_KEY") and kind is None:
                tell(f"has the run in {folder}" if send(parts) else f"did not take the run; {later(parts)}")
            else:
                tell(f"keeps the run in a folder; {later(parts)}")
        except Exception as error:
            tell(f"did not finish: {error}")


def send(parts: Sequence[Path]) -> bool:
    """Whether W&B took the parts of a run in time, of which it leaves out those it has.

    wandb marks what was taken, since its exit code is 0 also where the server refuses.
    """
    command = [sys.executable, "-m", "wandb", "sync", *(part.name for part in parts)]
    with subprocess.Popen(
        command,
        cwd=parts[0].parent,
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
    return all(any(part.glob("*.wandb.synced")) for part in parts)


def later(parts: Sequence[Path]) -> str:
    """How to send the parts of a run by hand."""
    return f"to send it: .venv/bin/wandb sync {shlex.join(map(str, parts))}"


def tell(text: str) -> None:
    """One line for the terminal."""
    warn(f"W&B {printable(text)}")
