"""Learning-rate schedules: pure functions of the step, and the thin classes that put them into an optimizer."""

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def warmup_cosine(step: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: float) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then a cosine from ``max_lr`` to ``min_lr``, then that.

    The first step has ``max_lr / warmup_steps``, step ``warmup_steps`` the peak, step ``max_steps`` the floor: to the
    last bit what build-nanogpt's ``get_lr`` gives.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step > max_steps:
        return min_lr
    ratio = (step - warmup_steps) / (max_steps - warmup_steps) if max_steps > warmup_steps else 1.0
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (max_lr - min_lr)


class WarmupCosine(LRScheduler):
    """``warmup_cosine`` with each parameter group's own lr as its peak.

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        warmup_steps: optimizer steps of linear warm-up.
        max_steps: the step at which the floor is reached; None means ``trainer.max_steps``, which GPTModule fills in.
        min_lr: the floor, reached at ``max_steps`` and kept after it.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 715, max_steps: int | None = None, min_lr: float = 6e-5
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"lr_scheduler.warmup_steps is {warmup_steps}: give 0 or more optimizer steps")
        if max_steps is not None and max_steps < warmup_steps:
            raise ValueError(
                f"lr_scheduler.max_steps={max_steps} ends before the warm-up of {warmup_steps} steps: "
                "lower warmup_steps or raise max_steps"
            )
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps
        self.min_lr = min_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        end = math.inf if self.max_steps is None else self.max_steps
        return [
            warmup_cosine(self.last_epoch, float(max_lr), self.min_lr, self.warmup_steps, end)
            for max_lr in self.base_lrs
        ]

    def state_dict(self) -> dict[str, int]:
        """The step alone: peak, floor and length are the command's, also when it goes on with a run."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
