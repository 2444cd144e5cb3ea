"""The optimizers, AdamW and Muon, and the parameter groups that weight decay applies to."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim.optimizer import ParamsT

from gpt2_lightning.errors import UserError

NamedParameter = tuple[str, nn.Parameter]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW with GPT-3's settings. Fusing it saves a large part of a small model's step on a CPU."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 6e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        # the argument fused=True would also leave the unscaling of fp16 gradients to the optimizer, after our clipping
        for group in self.param_groups:
            group["fused"] = True


def decay_groups(named_parameters: Iterable[NamedParameter]) -> list[dict[str, Any]]:
    """Two parameter groups: matrices and embeddings, which decay, and 1-D biases and LayerNorms, which do not.

    The first group takes the optimizer's ``weight_decay``, the second has 0. Parameters that need no gradient are left
    out. ``param_names`` holds the name of each parameter.
    """
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    decay = [(name, p) for name, p in trained if p.dim() >= 2]
    no_decay = [(name, p) for name, p in trained if p.dim() < 2]
    return [_group(decay), _group(no_decay) | {"weight_decay": 0.0}]


def _group(named_parameters: list[NamedParameter]) -> dict[str, Any]:
    return {"params": [p for _, p in named_parameters], "param_names": [name for name, _ in named_parameters]}


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for the matrices of the blocks and AdamW for all other parameters, in one optimizer.

    A matrix moves along its momentum, orthogonalized (all singular values near 1) and scaled to a root mean square of
    0.2 · lr per entry. That is about the size of AdamW's updates (Liu et al. 2025, "Muon is scalable for LLM
    training"), so one learning rate, schedule and weight decay can serve both. The query, key and value matrices in
    ``c_attn`` are orthogonalized separately. In a distributed run each rank orthogonalizes its share of the matrices.

    Args:
        params: ``model.named_parameters()``, or groups from ``decay_groups``: matrices of blocks are found by name.
        lr: peak learning rate of the matrices.
        adamw_lr: peak learning rate of embeddings, biases and LayerNorms; None takes ``lr``.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: decoupled weight decay of matrices and embeddings.
        momentum: Nesterov momentum of the matrices, in [0, 1).
        momentum_warmup_steps: steps over which the momentum rises from 0.85, so that the noisy first gradients are
            forgotten soon.

    Raises:
        UserError: parameters without names, without a matrix of a block, or sharded ones; a momentum out of range.
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
        if not 0 <= momentum < 1:
            raise UserError(f"momentum={momentum}: give at least 0 and less than 1")
        groups: list[Any] = list(params)
        if groups and isinstance(groups[0], tuple):
            groups = decay_groups(groups)
        if not all(isinstance(group, dict) and "param_names" in group for group in groups):
            raise UserError("Muon selects matrices by name: give it model.named_parameters()")
        muon_settings = {"orthogonal": True, "momentum": momentum, "momentum_warmup_steps": momentum_warmup_steps}
        adamw_settings = {"orthogonal": False, "lr": lr if adamw_lr is None else adamw_lr}
        muon_groups, adamw_groups = [], []
        for group in groups:
            named = list(zip(group["param_names"], group["params"], strict=True))
            matrices = [(name, p) for name, p in named if _is_block_matrix(name, p)]
            others = [(name, p) for name, p in named if not _is_block_matrix(name, p)]
            muon_groups.append(group | _group(matrices) | muon_settings)
            adamw_groups.append(group | _group(others) | adamw_settings)
        if not any(group["params"] for group in muon_groups):
            raise UserError("Muon found no matrix of a block (…h.0.….weight) among the parameters")
        # importing DTensor for isinstance would take a second
        if any(hasattr(p, "full_tensor") for group in muon_groups for p in group["params"]):
            raise UserError("Muon orthogonalizes whole matrices, but these are sharded: set trainer.strategy to ddp")
        super().__init__([g for g in muon_groups + adamw_groups if g["params"]], lr, betas, eps, weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:  # called before the groups are split: Lightning's closure clips the gradients of all
            with torch.enable_grad():
                loss = closure()
        all_groups = self.param_groups
        try:
            self.param_groups = [group for group in all_groups if not group["orthogonal"]]
            super().step()
        finally:
            self.param_groups = all_groups
        for group in all_groups:
            if group["orthogonal"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Matrices of one shape are orthogonalized together, as one batched matmul."""
        updates: list[tuple[Tensor, Tensor]] = []
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if p.grad is None:
                continue
            update = self._nesterov_momentum(p, group)
            updates.append((p, update))
            for matrix in update.chunk(3 if name.endswith("c_attn.weight") else 1):  # views of update
                wide = matrix.t() if matrix.size(0) > matrix.size(1) else matrix
                by_shape[wide.shape].append(wide)
        for shape, matrices in by_shape.items():
            scale = 0.2 * max(shape) ** 0.5  # entries of an orthogonal matrix have RMS 1 / √(longer side)
            for matrix, orthogonal in zip(matrices, _orthogonalize_across_ranks(torch.stack(matrices)), strict=True):
                matrix.copy_(orthogonal).mul_(scale)
        for p, update in updates:
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _nesterov_momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Updates the momentum of ``p`` and returns it with the current gradient counted once more (Nesterov)."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)  # on the device, so that no step synchronizes
            state["momentum_buffer"] = torch.zeros_like(p)
        state["step"] += 1
        warmup = (state["step"] / max(1, group["momentum_warmup_steps"])).clamp(max=1)
        momentum = 0.85 + (group["momentum"] - 0.85) * warmup
        state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum_buffer"], momentum)


def _is_block_matrix(name: str, p: Tensor) -> bool:
    return p.dim() == 2 and re.match(r"(.*\.)?h\.\d+\.", name) is not None  # transformer.h.0.attn.c_attn.weight


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Brings all singular values of each matrix near 1, in bf16. ``matrices``: (n, rows, columns), rows ≤ columns.

    Newton-Schulz iteration: an odd polynomial of a matrix changes only its singular values, and needs only matmuls.
    """
    # a·x + b·x³ + c·x⁵ has the steepest slope at 0 that still keeps (0, 1] within about 0.7 to 1.2 (Jordan et al. 2024)
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value exceeds the Frobenius norm
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b·gram + c·gram²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a·x + polynomial·x
    return x


def _orthogonalize_across_ranks(matrices: Tensor) -> Tensor:
    """``orthogonalize`` of matrices that every rank holds: each computes its share, then all gather the results."""
    world_size = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if world_size == 1:
        return orthogonalize(matrices)
    share = -(-len(matrices) // world_size)  # rounded up
    mine = matrices[share * distributed.get_rank() :][:share]
    padded = torch.zeros(share, *matrices.shape[1:], dtype=torch.bfloat16, device=matrices.device)
    if len(mine) > 0:
        padded[: len(mine)] = orthogonalize(mine)
    shares = [torch.empty_like(padded) for _ in range(world_size)]
    distributed.all_gather(shares, padded)
    return torch.cat(shares)[: len(matrices)]
