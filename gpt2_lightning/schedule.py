"""Learning-rate and batch-size schedules: pure functions of the step, and the thin classes that carry them."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gpt2_lightning.errors import UserError


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


def warmup_stable_decay(
    step: int, max_lr: float, min_lr: float, warmup_steps: int, decay_steps: float, max_steps: float
) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, ``max_lr``, and in the last steps a line to ``min_lr``.

    The line takes ``decay_steps``, or all that the warm-up leaves where that is less, and ends at ``max_steps``.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    if step >= max_steps:
        return min_lr
    if max_steps == math.inf:
        return max_lr
    steps = min(decay_steps, max_steps - warmup_steps)
    return min_lr + (max_lr - min_lr) * min(1.0, (max_steps - step) / steps if steps else 1.0)


class Warmup(LRScheduler, ABC):
    """A schedule that warms up; ``rate`` says what comes then. Each parameter group's own lr is its peak.

    Args:
        optimizer: its groups' ``lr`` are the peaks.
        warmup_steps: optimizer steps of linear warm-up.
        max_steps: the step at which the floor is reached; None means ``trainer.max_steps``, which GPTModule fills in.
        min_lr: the floor, reached at ``max_steps`` and kept after it.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, max_steps: int | None, min_lr: float) -> None:
        if warmup_steps < 0:
            raise UserError(f"lr_scheduler.warmup_steps is {warmup_steps}: give 0 or more optimizer steps")
        if not 0 <= min_lr <= max(group["lr"] for group in optimizer.param_groups):
            raise UserError(f"lr_scheduler.min_lr is {min_lr}: give 0 or more, and not more than the optimizer's lr")
        if max_steps is not None and max_steps < warmup_steps:
            raise UserError(
                f"lr_scheduler.max_steps={max_steps} ends before the warm-up of {warmup_steps} steps: "
                "lower warmup_steps or raise max_steps"
            )
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps
        self.min_lr = min_lr
        super().__init__(optimizer)

    @abstractmethod
    def rate(self, step: int, max_lr: float, max_steps: float) -> float:
        """Learning rate of step ``step`` (from 0) for the peak ``max_lr``; ``max_steps`` may be infinite."""

    def get_lr(self) -> list[float | Tensor]:
        end = math.inf if self.max_steps is None else self.max_steps
        return [self.rate(self.last_epoch, float(max_lr), end) for max_lr in self.base_lrs]

    def state_dict(self) -> dict[str, int]:
        """The step alone: peak, floor and length are the command's, also when it goes on with a run."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr


class WarmupCosine(Warmup):
    """``warmup_cosine``: build-nanogpt's schedule, GPT-3's. Arguments as ``Warmup``'s."""

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 715, max_steps: int | None = None, min_lr: float = 6e-5
    ) -> None:
        super().__init__(optimizer, warmup_steps, max_steps, min_lr)

    def rate(self, step: int, max_lr: float, max_steps: float) -> float:
        return warmup_cosine(step, max_lr, self.min_lr, self.warmup_steps, max_steps)


class WarmupStableDecay(Warmup):
    """``warmup_stable_decay``: before the decay, a run can be made longer. Arguments as ``Warmup``'s.

    Args:
        decay_steps: optimizer steps of the line down to ``min_lr`` at the end.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 715,
        decay_steps: int = 3800,
        max_steps: int | None = None,
        min_lr: float = 0.0,
    ) -> None:
        if decay_steps < 0:
            raise UserError(f"lr_scheduler.decay_steps is {decay_steps}: give 0 or more optimizer steps")
        self.decay_steps = decay_steps
        super().__init__(optimizer, warmup_steps, max_steps, min_lr)

    def rate(self, step: int, max_lr: float, max_steps: float) -> float:
        return warmup_stable_decay(step, max_lr, self.min_lr, self.warmup_steps, self.decay_steps, max_steps)


class WarmupLinear(Warmup):
    """Linear warm-up, then a line from the peak to 0. Arguments as ``Warmup``'s."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 715, max_steps: int | None = None) -> None:
        super().__init__(optimizer, warmup_steps, max_steps, min_lr=0.0)

    def rate(self, step: int, max_lr: float, max_steps: float) -> float:
        return warmup_stable_decay(step, max_lr, self.min_lr, self.warmup_steps, math.inf, max_steps)


@dataclass(frozen=True)
class BatchSizeSchedule:
    """A batch that begins small and doubles until it is ``total_batch_tokens``, as GPT-3 ramped its own.

    The paper (Brown et al. 2020, table 2.1 and appendix B) grows it linearly with the tokens seen, from 32k to the full
    size over the first 4-12 billion. Here it doubles each time that line has reached the next doubling.
    """

    start_tokens: int = 32768
    """tokens of the first step; ``total_batch_tokens`` is this times a power of two"""
    ramp_tokens: float = 4e9
    """tokens trained on when the full size is reached"""


class Stage(NamedTuple):
    """Steps of one size."""

    first_step: int
    first_token: int  # of the run: those of all the steps before
    step_tokens: int


def batch_size_stages(total_batch_tokens: int, schedule: BatchSizeSchedule | None) -> list[Stage]:
    """The sizes that a run's steps go through: one without a schedule, else doubling from ``start_tokens``.

    Raises:
        ValueError: ``total_batch_tokens`` is not ``start_tokens`` times a power of two, or nothing to ramp over.
    """
    if schedule is None:
        return [Stage(0, 0, total_batch_tokens)]
    if schedule.start_tokens is None or schedule.ramp_tokens is None:  # left empty in a recipe
        raise UserError("data.batch_size_schedule needs start_tokens and ramp_tokens: give both, or set it to null")
    start, doublings = schedule.start_tokens, 0
    while 0 < start << doublings < total_batch_tokens:
        doublings += 1
    if start << doublings != total_batch_tokens:
        halves = [total_batch_tokens >> k for k in range(8) if total_batch_tokens % (1 << k) == 0]
        raise UserError(
            f"data.batch_size_schedule.start_tokens={start} does not reach data.total_batch_tokens="
            f"{total_batch_tokens} by doubling: set it to one of {halves}"
        )
    if not 0 < schedule.ramp_tokens < math.inf:
        raise UserError(
            f"data.batch_size_schedule.ramp_tokens is {schedule.ramp_tokens}: give the tokens after which the batch "
            "has its full size, such as 4.0e+9, or set data.batch_size_schedule to null"
        )
    stages = [Stage(0, 0, start)]
    for k in range(1, doublings + 1):
        step, token, step_tokens = stages[-1]
        # where the line from start_tokens at 0 to total_batch_tokens at ramp_tokens passes start · 2^k
        due = schedule.ramp_tokens * (((1 << k) - 1) / ((1 << doublings) - 1))
        steps = max(0, math.ceil((due - token) / step_tokens))
        stages.append(Stage(step + steps, token + steps * step_tokens, start << k))
    return stages


def tokens_before(step: int, stages: list[Stage]) -> int:
    """Tokens that a run has trained on before ``step`` (from 0)."""
    stage = next(stage for stage in reversed(stages) if stage.first_step <= step)
    return stage.first_token + (step - stage.first_step) * stage.step_tokens
