"""When to do something during training: after 0, N, 2N … optimizer steps and after the last one."""

import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.callbacks.signals import stop_signal
from gpt2_lightning.errors import UserError
from gpt2_lightning.module import GPTModule
from gpt2_lightning.sharding import gathered


def is_due(step: int, every_n_steps: int, max_steps: int) -> bool:
    """Whether something that happens every N steps happens after ``step`` of them: at 0, N, 2N … and at the end."""
    return every_n_steps > 0 and (step % every_n_steps == 0 or step == max_steps)


def record(trainer: Trainer, values: dict[str, float], step: int) -> None:
    """Writes ``values`` at ``step`` to all loggers, and where Lightning's callbacks that monitor a metric look."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step)
    trainer.callback_metrics.update(values)  # type: ignore[arg-type]


class EveryNSteps(Callback, ABC):
    """Calls ``run`` after 0, N, 2N … optimizer steps and after the last, once each, also across a resume. 0 = off.

    What is due when a signal stops the run is done first thing by the run that goes on; after the last step none does.
    """

    evaluates = True
    """Whether it evaluates, which can wait while a signal stops the run, and needs the whole model on each rank."""

    section = "trainer.callbacks"
    """The section of a recipe that its settings stand in."""

    label = "other callbacks"
    """What it is called where ``TimeSpent`` tells what a run's time went into."""

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 0:
            raise UserError(
                f"{self.section}.every_n_steps is {every_n_steps}: give a number of optimizer steps, or 0 for never"
            )
        self.every_n_steps = every_n_steps
        self.last_step = -1
        """The step count that ``run`` was last called at."""
        self.seconds = 0.0
        """Time spent in ``run``, which is not training time."""

    @abstractmethod
    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        """What there is to do after ``step`` optimizer steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._run_if_due(trainer, pl_module, last=trainer.should_stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run_if_due(trainer, pl_module, last=True)  # trainer.max_time or a user's callback may end it early

    def _run_if_due(self, trainer: Trainer, module: LightningModule, last: bool = False) -> None:
        step = trainer.global_step
        if self.evaluates and stop_signal(trainer) and step < trainer.max_steps:
            return
        if step > self.last_step and is_due(step, self.every_n_steps, step if last else trainer.max_steps):
            started = time.perf_counter()
            self.last_step = step
            assert isinstance(module, GPTModule)
            with gathered(module.model) if self.evaluates else nullcontext():
                self.run(trainer, module, step)
            self.seconds += time.perf_counter() - started

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]
