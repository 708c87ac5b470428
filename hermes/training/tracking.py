"""Weights & Biases, optional and harmless: on by `wandb.enabled`, offline without a key, and never the reason a run fails."""

import os
import sys
from typing import Any, Literal

from hermes import params
from hermes.artifacts import scratch_folder
from hermes.settings.untracked import TrackingSettings


class Params(params.Params):
    """The untracked `wandb` key of params.yaml."""

    wandb: TrackingSettings


class Tracking:
    """A W&B run, or nothing at all; the first failure ends the logging with one line and not the training."""

    def __init__(self, run: Any = None) -> None:
        self.run = run

    @classmethod
    def start(cls, config: dict[str, Any]) -> "Tracking":
        """Starts a run as params.yaml says; without a key it is written to a folder for a later `wandb sync`."""
        settings = params.load(Params).wandb
        if not settings.enabled:
            return cls()
        try:
            import wandb  # slow to import, so only where it is on

            folder = scratch_folder("wandb")
            folder.mkdir(parents=True, exist_ok=True)
            mode: Literal["online", "offline"] = "online" if os.environ.get("WANDB_API_KEY") else "offline"
            return cls(wandb.init(project=settings.project, config=config, mode=mode, dir=str(folder)))
        except Exception as error:
            print(f"W&B is off: {error}", file=sys.stderr)
            return cls()

    def log(self, values: dict[str, float], step: int) -> None:
        """Logs the numbers of one step."""
        if self.run is None:
            return
        try:
            self.run.log(dict(values), step=step)
        except Exception as error:
            print(f"W&B stopped logging: {error}", file=sys.stderr)
            self.run = None

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:
                print(f"W&B did not finish: {error}", file=sys.stderr)
