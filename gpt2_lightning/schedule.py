"""Learning-rate and batch-size schedules: pure functions of the step, and the classes that apply them."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gpt2_lightning.errors import UserError


def warmup_cosine(step: int, max_lr: float, min_lr: float, warmup_steps: int, max_steps: float) -> float:
    """Learning rate of ``step`` (from 0): linear warmup to ``max_lr``, then cosine decay to ``min_lr``.

    Step 0 has ``max_lr / warmup_steps``; ``max_steps`` and all later steps have ``min_lr``. Returns the same doubles as
    ``get_lr`` of build-nanogpt.
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
    """Learning rate of ``step`` (from 0): linear warmup, constant ``max_lr``, then linear decay to ``min_lr``.

    The decay takes ``decay_steps``, or all steps after the warmup if those are fewer, and ends at ``max_steps``.
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
    """Base class of the schedules. Scales each parameter group from its own peak, the optimizer's ``lr``.

    Args:
        optimizer: the optimizer whose learning rates are scheduled.
        warmup_steps: steps of linear warmup.
        max_steps: step at which ``min_lr`` is reached; None means ``trainer.max_steps`` (set by ``GPTModule``).
        min_lr: learning rate from ``max_steps`` on.

    Raises:
        UserError: ``min_lr`` is above the peak, or ``max_steps`` lies within the warmup.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, max_steps: int | None, min_lr: float) -> None:
        peak = max(group["lr"] for group in optimizer.param_groups)
        if not 0 <= min_lr <= peak:
            raise UserError(f"lr_scheduler.min_lr is {min_lr}: give at least 0 and at most the optimizer's lr ({peak})")
        if max_steps is not None and max_steps < warmup_steps:
            raise UserError(
                f"lr_scheduler.max_steps={max_steps} ends before the warmup of {warmup_steps} steps: "
                "lower warmup_steps or raise max_steps"
            )
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps
        self.min_lr = min_lr
        super().__init__(optimizer)

    @abstractmethod
    def rate(self, step: int, max_lr: float, max_steps: float) -> float:
        """Learning rate of ``step`` (from 0) for the peak ``max_lr``; ``max_steps`` may be infinite."""

    def get_lr(self) -> list[float | Tensor]:
        max_steps = math.inf if self.max_steps is None else self.max_steps
        return [self.rate(self.last_epoch, float(max_lr), max_steps) for max_lr in self.base_lrs]

    def state_dict(self) -> dict[str, int]:
        """Only the step: when a run resumes, the settings given then apply."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr


class WarmupCosine(Warmup):
    """Linear warmup and cosine decay, as GPT-3 and build-nanogpt. Arguments: see ``Warmup``."""

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 715, max_steps: int | None = None, min_lr: float = 6e-5
    ) -> None:
        super().__init__(optimizer, warmup_steps, max_steps, min_lr)

    def rate(self, step: int, max_lr: float, max_steps: float) -> float:
        return warmup_cosine(step, max_lr, self.min_lr, self.warmup_steps, max_steps)


class WarmupStableDecay(Warmup):
    """Linear warmup, constant rate, linear decay. Until the decay begins, a run can be extended.

    The other arguments: see ``Warmup``.

    Args:
        decay_steps: steps of the linear decay to ``min_lr`` at the end.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 715,
        decay_steps: int = 3800,
        max_steps: int | None = None,
        min_lr: float = 0.0,
    ) -> None:
        self.decay_steps = decay_steps
        super().__init__(optimizer, warmup_steps, max_steps, min_lr)

    def rate(self, step: int, max_lr: float, max_steps: float) -> float:
        return warmup_stable_decay(step, max_lr, self.min_lr, self.warmup_steps, self.decay_steps, max_steps)


class WarmupLinear(Warmup):
    """Linear warmup, then linear decay to 0. Arguments: see ``Warmup``."""

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 715, max_steps: int | None = None) -> None:
        super().__init__(optimizer, warmup_steps, max_steps, min_lr=0.0)

    def rate(self, step: int, max_lr: float, max_steps: float) -> float:
        return warmup_stable_decay(step, max_lr, self.min_lr, self.warmup_steps, math.inf, max_steps)


@dataclass(frozen=True)
class BatchSizeSchedule:
    """Ramps the batch up from ``start_tokens`` to ``total_batch_tokens``, as GPT-3 did, by doubling it.

    GPT-3 (Brown et al. 2020, table 2.1 and appendix B) increased its batch linearly with the tokens seen, from 32k to
    the full size over the first 4-12 billion tokens. Here the batch doubles when that line reaches the next doubling.
    """

    start_tokens: int = 32768
    """Tokens of the first step; ``total_batch_tokens`` must be this times a power of two."""
    ramp_tokens: float = 4e9
    """Tokens seen when the full batch size is reached."""


class Stage(NamedTuple):
    """A range of steps with the same batch size, up to the next stage."""

    first_step: int
    first_token: int  # tokens trained on before first_step
    step_tokens: int


def batch_size_stages(total_batch_tokens: int, schedule: BatchSizeSchedule | None) -> list[Stage]:
    """The stages of a run: a single one without a schedule, else one for each doubling from ``start_tokens``.

    Raises:
        UserError: ``total_batch_tokens`` is not ``start_tokens`` times a power of two.
    """
    if schedule is None:
        return [Stage(0, 0, total_batch_tokens)]
    start = schedule.start_tokens
    sizes = [start]
    while 0 < sizes[-1] < total_batch_tokens:
        sizes.append(2 * sizes[-1])
    if sizes[-1] != total_batch_tokens:
        halves = [total_batch_tokens >> k for k in range(8) if total_batch_tokens % (1 << k) == 0]
        raise UserError(
            f"data.batch_size_schedule.start_tokens={start} does not double up to data.total_batch_tokens="
            f"{total_batch_tokens}: set it to one of {halves}"
        )
    stages = [Stage(0, 0, start)]
    for size in sizes[1:]:
        step, token, step_tokens = stages[-1]
        # tokens at which a line from (0, start) to (ramp_tokens, total_batch_tokens) reaches this size
        due = schedule.ramp_tokens * ((size - start) / (total_batch_tokens - start))
        steps = max(0, math.ceil((due - token) / step_tokens))
        stages.append(Stage(step + steps, token + steps * step_tokens, size))
    return stages


def tokens_before(step: int, stages: list[Stage]) -> int:
    """Tokens that a run has trained on before ``step`` (from 0)."""
    stage = next(stage for stage in reversed(stages) if stage.first_step <= step)
    return stage.first_token + (step - stage.first_step) * stage.step_tokens
