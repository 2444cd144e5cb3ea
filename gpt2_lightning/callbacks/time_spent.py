"""What a run's time went into, in one line at its end."""

import time

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.callbacks.steps import EveryNSteps


def time_line(seconds: float, parts: dict[str, float], first_step: int = 0) -> str:
    """``time: 2 h 10 min, of which validation 1.1 %, …``, of this start alone where it went on from ``first_step``."""
    start = f" since step {first_step}, where this start went on" if first_step else ""
    shares = ", ".join(f"{name} {part / seconds:.1%}".replace("%", " %") for name, part in parts.items())
    return f"time{start}: {duration(seconds)}{shares and f', of which {shares}'}"


def duration(seconds: float) -> str:
    """In the two largest units that it fills: ``2 h 10 min``, ``3 min 5 s``, ``4.2 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(round(seconds / 60), 60)
    return f"{hours} h {m} min" if hours else f"{minutes} min {s} s"


class TimeSpent(Callback):
    """Takes the time from before the first evaluation to after the last; data that is prepared first is not in it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.first_step = trainer.global_step
        self.started = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # after every on_train_end
        if not hasattr(self, "started"):  # resumed at its last step, so that there was nothing to do
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        parts: dict[str, float] = {}
        for callback in callbacks:
            if isinstance(callback, EveryNSteps) and callback.every_n_steps > 0:
                parts[callback.label] = parts.get(callback.label, 0.0) + callback.seconds
        pl_module.print(time_line(time.perf_counter() - self.started, parts, self.first_step))
