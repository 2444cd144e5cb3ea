"""When to do something during training: after 0, N, 2N … optimizer steps and after the last one."""

import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.callbacks.signals import stop_signal
from gpt2_lightning.module import GPTModule
from gpt2_lightning.sharding import gathered


def is_due(step: int, every_n_steps: int, max_steps: int) -> bool:
    """Whether something that happens every N steps happens after ``step`` of them: at 0, N, 2N … and at the end."""
    return every_n_steps > 0 and (step % every_n_steps == 0 or step == max_steps)


class StepCallback(Callback, ABC):
    """Calls ``run`` after each N-th optimizer step (not micro-batch) and after the last, once each, also over a resume.

    Args:
        every_n_steps: N; 0 = never.
    """

    evaluates = True
    """Whether it evaluates the model. Then it also runs before the first step, has the whole model on each rank, and is
    left to the resumed run if a signal stops this one."""

    label: str | None = None
    """Its name in the ``time:`` line at the end of a run. None counts its time as training time."""

    def __init__(self, every_n_steps: NonNegativeInt) -> None:
        self.every_n_steps: int = every_n_steps
        self.last_step = -1
        """Number of optimizer steps at the last call of ``run``."""
        self.seconds = 0.0
        """Time spent in ``run``."""

    @abstractmethod
    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        """What to do after ``step`` optimizer steps."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.evaluates:
            self._run_if_due(trainer, pl_module)
        else:
            self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._run_if_due(trainer, pl_module, last=trainer.should_stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run_if_due(trainer, pl_module, last=True)  # e.g. trainer.max_time ended it early

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
