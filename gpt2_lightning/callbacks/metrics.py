"""How fast a run trains, and what its time went into."""

import time
from collections.abc import Callable
from datetime import timedelta

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.callbacks.steps import StepCallback
from gpt2_lightning.module import GPTModule, record


class StepMetrics(StepCallback):
    """Logs ``train/tokens_per_sec`` and ``train/mfu`` beside the module's ``train/*``, and prints the ``time:`` line.

    The rate is that of all devices since the last logged step, without evaluations and checkpoints.

    Args:
        peak_flops: bf16 FLOP/s of a device, or None if unknown; then there is no ``train/mfu``.
    """

    evaluates = False

    def __init__(self, peak_flops: Callable[[torch.device], float | None]) -> None:
        super().__init__(every_n_steps=1)
        self.peak_flops = peak_flops
        self.started: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.peak = self.peak_flops(pl_module.device)
        self.first_step = self.logged_step = trainer.global_step
        self.started = self.logged_at = time.perf_counter()
        self.paused = sum(seconds_by_label(trainer).values())

    def run(self, trainer: Trainer, module: GPTModule, step: int) -> None:
        if not module.is_logged(step - 1):
            return
        now, paused = time.perf_counter(), sum(seconds_by_label(trainer).values())
        seconds = now - self.logged_at - (paused - self.paused)
        tokens_before = trainer.datamodule.tokens_before  # type: ignore[attr-defined]
        rate = (tokens_before(step) - tokens_before(self.logged_step)) / seconds
        values = {"train/tokens_per_sec": rate}
        if self.peak is not None:
            values["train/mfu"] = rate * module.model.flops_per_token() / (self.peak * trainer.world_size)
        record(trainer, values, step - 1)
        self.logged_step, self.logged_at, self.paused = step, now, paused

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # after each callback's on_train_end
        if self.started is not None:  # None: a complete run was resumed, with no step to make
            seconds = time.perf_counter() - self.started
            pl_module.print(time_line(seconds, seconds_by_label(trainer), self.first_step))


def seconds_by_label(trainer: Trainer) -> dict[str, float]:
    """Seconds spent so far on what is not training, such as validation, by the labels of the callbacks."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found: dict[str, float] = {}
    for callback in callbacks:
        if isinstance(callback, StepCallback) and callback.label is not None and callback.every_n_steps > 0:
            found[callback.label] = found.get(callback.label, 0.0) + callback.seconds
    return found


def time_line(seconds: float, parts: dict[str, float], first_step: int = 0) -> str:
    """``time: 2:10:00, of which validation 1.1%, …``; a run that was resumed reports the time since ``first_step``."""
    since = f" since step {first_step}" if first_step else ""
    shares = ", ".join(f"{name} {part / seconds:.1%}" for name, part in parts.items())
    return f"time{since}: {timedelta(seconds=round(seconds))}{shares and f', of which {shares}'}"
