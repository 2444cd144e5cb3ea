"""The optimizers of GPT-2, and what weight decay touches."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import ParamsT

from gpt2_lightning.errors import UserError

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
    tied one once (``named_parameters`` lists it once), its name beside it. Those that want no gradient are left out.
    """
    wanted = [(name, p) for name, p in named_parameters if p.requires_grad]

    def group(pairs: list[tuple[str, nn.Parameter]], **settings: float) -> dict[str, Any]:
        return {"params": [p for _, p in pairs], "param_names": [name for name, _ in pairs], **settings}

    return [
        group([(name, p) for name, p in wanted if p.dim() >= 2]),
        group([(name, p) for name, p in wanted if p.dim() < 2], weight_decay=0.0),
    ]


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest, as one optimizer.

    A matrix moves by its momentum with all singular values brought near 1 (``orthogonalize``), scaled so that an entry
    changes by 0.2 · lr in root mean square, about what AdamW's do (Liu et al. 2025, "Muon is scalable for LLM
    training"): one learning rate, schedule and weight decay can serve both. Query, key and value, which GPT-2 keeps in
    one ``c_attn``, are three matrices. Under DDP each rank orthogonalises its share of them.

    Args:
        params: groups as ``decay_groups`` makes them, or ``model.named_parameters()``: names tell what is in a block.
        lr: peak of the matrices.
        adamw_lr: peak of embeddings, biases and LayerNorms; None takes ``lr``.
        betas: AdamW's, as ``eps``.
        weight_decay: decoupled, of matrices and embeddings.
        momentum: of the matrices, in Nesterov's form.
        momentum_warmup_steps: updates over which the momentum rises from 0.85, so that the first and noisiest
            gradients are soon forgotten.

    Raises:
        ValueError: parameters without names, no matrix of a block among them, or sharded ones.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 2e-3,
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        momentum_warmup_steps: int = 300,
    ) -> None:
        if not 0 <= momentum < 1 or not 0 <= momentum_warmup_steps < 2**40:
            raise UserError(
                f"momentum={momentum}, momentum_warmup_steps={momentum_warmup_steps}: give 0 to below 1, and at least 0"
            )
        if adamw_lr is not None and not adamw_lr >= 0:  # of a group, at which torch's AdamW does not look
            raise UserError(f"adamw_lr={adamw_lr}: give 0 or more, or null for that of the matrices")
        groups: list[Any] = list(params)
        if groups and isinstance(groups[0], tuple):
            groups = decay_groups(groups)
        if not all(isinstance(group, dict) and "param_names" in group for group in groups):
            raise UserError("Muon tells matrices from embeddings by name: give model.named_parameters()")
        for_adamw = {"orthogonal": False, "lr": lr if adamw_lr is None else adamw_lr}
        for_matrices = {"orthogonal": True, "momentum": momentum, "momentum_warmup_steps": momentum_warmup_steps}
        split = [
            _keep(group, in_a_block) | (for_matrices if in_a_block else for_adamw)
            for in_a_block in (True, False)
            for group in groups
        ]
        super().__init__([g for g in split if g["params"]], lr, betas, eps, weight_decay)
        matrices = [p for group in self.param_groups if group["orthogonal"] for p in group["params"]]
        if not matrices:
            raise UserError("Muon found no matrix of a block (…h.0.….weight) among the parameters")
        if any(hasattr(p, "full_tensor") for p in matrices):  # DTensors, whose import takes a second
            raise UserError("Muon orthogonalises whole matrices, and these are sharded: set trainer.strategy to ddp")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:  # before the groups are taken apart: Lightning clears and clips gradients in there
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:  # torch's AdamW sees the groups that are its own
            self.param_groups = [group for group in groups if not group["orthogonal"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        updates = []
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if p.grad is None:
                continue
            update = self._momentum(p, group)
            updates.append((p, update))
            for matrix in update.chunk(3 if name.endswith("c_attn.weight") else 1):  # views: writing there writes here
                wide = matrix.t() if matrix.size(0) > matrix.size(1) else matrix
                by_shape[wide.shape].append(wide)
        for shape, matrices in by_shape.items():
            scale = 0.2 * max(shape) ** 0.5  # orthogonal, an entry is 1 / √(longer side) in root mean square
            for matrix, orthogonal in zip(matrices, _orthogonalize_on_all_ranks(torch.stack(matrices)), strict=True):
                matrix.copy_(orthogonal).mul_(scale)
        for p, update in updates:
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """What ``p`` is to move along: its momentum, looked at one gradient ahead (Nesterov)."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)  # there, so that nothing waits for the device
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        warm = (state["step"] / max(1, group["momentum_warmup_steps"])).clamp(max=1)
        momentum = 0.85 + (group["momentum"] - 0.85) * warm
        state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum_buffer"], momentum)


def _keep(group: dict[str, Any], in_a_block: bool) -> dict[str, Any]:
    """The group with those of its parameters that are, or are not, matrices of a block."""
    kept = [
        (name, p)
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if (p.dim() == 2 and _OF_A_BLOCK.match(name) is not None) == in_a_block
    ]
    return group | {"params": [p for _, p in kept], "param_names": [name for name, _ in kept]}


_OF_A_BLOCK = re.compile(r"(.*\.)?h\.\d+\.")  # transformer.h.0.attn.c_attn.weight

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""a·x + b·x³ + c·x⁵: the steepest at 0 that keeps (0, 1] within about 0.7 to 1.2 (Jordan et al. 2024)."""


def orthogonalize(stack: Tensor, iterations: int = 5) -> Tensor:
    """Matrices (n, rows, columns), rows ≤ columns, with all their singular values brought near 1; in bf16.

    Newton–Schulz: an odd polynomial of a matrix acts on its singular values alone, and takes only matmuls.
    """
    a, b, c = _QUINTIC
    x = stack.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above the Frobenius norm
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _orthogonalize_on_all_ranks(stack: Tensor) -> Tensor:
    """``orthogonalize``, each rank of the job doing its share of the matrices, which all of them hold."""
    world_size = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if world_size == 1:
        return orthogonalize(stack)
    share = -(-len(stack) // world_size)
    first = share * distributed.get_rank()
    mine = torch.zeros(share, *stack.shape[1:], dtype=torch.bfloat16, device=stack.device)
    if first < len(stack):
        done = orthogonalize(stack[first : first + share])
        mine[: len(done)] = done
    shares = [torch.empty_like(mine) for _ in range(world_size)]
    distributed.all_gather(shares, mine)
    return torch.cat(shares)[: len(stack)]
