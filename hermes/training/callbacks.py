"""What happens between the steps of training: when it is evaluated and saved, how a signal ends it, and what is shown of it."""

import signal
import sys
import time
from typing import Any

from transformers import TrainerCallback

from hermes.console import progress, warn
from hermes.run import Stopped, stop
from hermes.training import distributed
from hermes.training.tracking import Tracking

MOMENT = 2.0  # seconds in which the same signal is still the first one


class EvaluationSteps(TrainerCallback):
    """Evaluates so many times at equal distances, the last time behind the last step; at every step where there are fewer.

    The step before is saved, so that a signal need not wait for the end of an evaluation.
    """

    def __init__(self, evaluations: int) -> None:
        self.evaluations = evaluations

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = self.is_due(state.global_step, state.max_steps)
        control.should_save |= self.is_due(state.global_step + 1, state.max_steps)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether there is an evaluation behind this step."""
        return step * self.evaluations // steps > (step - 1) * self.evaluations // steps


class CheckpointAndStop(TrainerCallback):
    """On SIGTERM or Ctrl-C ends training behind the running step, with a checkpoint; the same signal again ends it at once.

    A rented GPU that is taken back sends SIGTERM and waits for half a minute. A step takes some seconds. An evaluation is given up, since
    the step before it is saved. One stop may arrive several times within a moment: a machine tells every process, and `make` passes it
    on. Several processes end at the same step, also where one alone was told.

    Raises:
        Stopped: training was ended.
    """

    def __init__(self, processes: int) -> None:
        self.processes, self.saved, self.leaving = processes, 0, False
        self.received: list[int] = []
        self.since = 0.0
        self.previous: dict[int, Any] = {}

    def receive(self, number: int, frame: Any) -> None:
        self.since = self.since or time.monotonic()
        is_another = number in self.received and time.monotonic() - self.since >= MOMENT
        if is_another and self.processes == 1:  # of several the others would wait for this one
            stop(number, frame)
        if not self.received and distributed.is_main(self.processes):
            warn("train: ending behind this step" + ("; once more ends it at once" if self.processes == 1 else ""))
        self.received.append(number)

    def is_time(self) -> bool:
        """Whether one of the processes was told to end; all hear the same answer."""
        return distributed.any_of(bool(self.received)) if self.processes > 1 else bool(self.received)

    def leave(self, state: Any) -> None:
        """Ends this process; the first one says where training goes on."""
        distributed.wait()
        if self.processes == 1:
            self.put_back()
        else:  # the launcher tells the others again as soon as one has ended
            for number in self.previous:
                signal.signal(number, signal.SIG_IGN)
        number = self.received[0] if self.received else signal.SIGTERM
        if not distributed.is_main(self.processes):
            sys.exit(128 + number)
        raise Stopped(number, f" behind step {self.saved} of {state.max_steps}, which is kept")

    def put_back(self) -> None:
        """Gives the signals back to who had them."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = state.global_step
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.receive)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.leaving = state.global_step < state.max_steps and self.is_time()
        if self.leaving and control.should_evaluate:
            self.leave(state)
        control.should_save |= self.leaving

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_time():
            self.leave(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = state.global_step
        if self.leaving:
            self.leave(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.put_back()


class ProgressAndTracking(TrainerCallback):
    """A progress bar with the latest preference loss, which begins at ln 2, and the same numbers to W&B where that is on."""

    def __init__(self, tracking: Tracking) -> None:
        self.tracking = tracking

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = progress(range(state.max_steps), "training", unit="step")
        self.bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "preference_loss" in logs:
            self.bar.set_postfix(preference_loss=f"{float(logs['preference_loss']):.4f}", refresh=False)
        self.tracking.log(logs, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
