"""The optimizers of GPT-2, and what weight decay touches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

FUSED_DEVICES = ("cpu", "cuda", "mps")


class AdamW(torch.optim.AdamW):
    """torch's AdamW with GPT-3's settings, in one kernel for the whole update where the device has it.

    On a CPU that kernel is a large part of a small model's step; ``torch.optim.AdamW`` itself has to be told.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if all(p.device.type in FUSED_DEVICES for group in self.param_groups for p in group["params"]):
            for group in self.param_groups:
                group["fused"] = True


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and embeddings decay; biases and LayerNorms, which are 1-D, do not.

    The first group takes the optimizer's own ``weight_decay``, the second has 0. Each parameter is in one of them, a
    tied one once (``named_parameters`` lists it once). Parameters that want no gradient are left out.
    """
    wanted = [p for _, p in named_parameters if p.requires_grad]
    return [
        {"params": [p for p in wanted if p.dim() >= 2]},
        {"params": [p for p in wanted if p.dim() < 2], "weight_decay": 0.0},
    ]
