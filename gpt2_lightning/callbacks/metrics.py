"""What each optimizer step cost and gave, logged once a step: one synchronisation, however many micro-batches."""

import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.callbacks.each_step import EachStep
from gpt2_lightning.callbacks.steps import EveryNSteps, record
from gpt2_lightning.module import GPTModule
from gpt2_lightning.tools.gpus import peak_flops


class StepMetrics(EachStep):
    """Logs ``train/*`` of step s at x = s, as build-nanogpt numbers them, every ``trainer.log_every_n_steps`` steps.

    ``train/loss`` is the mean over the step's micro-batches and ranks, ``train/grad_norm`` the norm before clipping,
    ``train/lr`` the rate the step was made with, ``train/tokens`` all tokens trained on after it,
    ``train/tokens_per_sec`` those of all devices per second since the last logged step, evaluation left out.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.peak = peak_flops(pl_module.device)
        self.logged_step = trainer.global_step
        self.logged_at = time.perf_counter()
        self.pauses = self._pauses(trainer)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.lr = optimizer.param_groups[0]["lr"]  # the scheduler moves on before the batch ends

    def after_step(self, trainer: Trainer, module: GPTModule, steps: int) -> None:
        every_n_steps: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = every_n_steps > 0 and (steps - 1) % every_n_steps == 0
        if not due and steps != trainer.max_steps:
            return
        loss = module.step_loss.item()
        now, pauses = time.perf_counter(), self._pauses(trainer)
        seconds = now - self.logged_at - (pauses - self.pauses)
        tokens_before = trainer.datamodule.tokens_before  # type: ignore[attr-defined]
        rate = (tokens_before(steps) - tokens_before(self.logged_step)) / seconds
        values = {
            "train/loss": loss,
            "train/grad_norm": float(module.grad_norm),
            "train/lr": float(self.lr),
            "train/tokens": float(tokens_before(steps)),
            "train/tokens_per_sec": rate,
        }
        if self.peak is not None:
            values["train/mfu"] = rate * module.model.flops_per_token() / (self.peak * trainer.world_size)
        record(trainer, values, steps - 1)
        self.logged_step, self.logged_at, self.pauses = steps, now, pauses

    @staticmethod
    def _pauses(trainer: Trainer) -> float:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return sum(c.seconds for c in callbacks if isinstance(c, EveryNSteps))
