"""One training step on the CPU: ours against the plain loop of the video, in turn, in one run. Not a test.

    python tests/bench_step.py [n_layer] [n_embd] [block_size] [micro_batch_size] [rounds]

The plain loop is build-nanogpt's: whole logits, F.cross_entropy, torch's AdamW as it comes on a CPU. Ours is what `fit`
does there: the chunked loss and the fused AdamW. Both start from the same weights; the gradients are compared first.
"""

import copy
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_lightning.loss import LinearCrossEntropy
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.module import CHUNK_LOGITS
from gpt2_lightning.optim import AdamW, decay_groups


def main(
    n_layer: int = 4, n_embd: int = 64, block_size: int = 128, micro_batch_size: int = 4, rounds: int = 40
) -> None:
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size, 50304, n_layer, 4, n_embd))
    plain = copy.deepcopy(ours)
    chunked = LinearCrossEntropy(CHUNK_LOGITS // 50304)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = {
        "ours": AdamW(decay_groups(ours.named_parameters()), **settings),
        "plain": torch.optim.AdamW(decay_groups(plain.named_parameters()), **settings),
    }
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda ids: chunked(ours.hidden(ids[:, :-1]).flatten(0, 1), ours.lm_head.weight, ids[:, 1:].flatten()),
        "plain": lambda ids: F.cross_entropy(plain(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()),
    }

    def step(name: str, model: GPT, ids: Tensor) -> float:
        started = time.perf_counter()
        optimizers[name].zero_grad()
        losses[name](ids).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers[name].step()
        return time.perf_counter() - started

    size = (micro_batch_size, block_size + 1)
    ids = torch.randint(0, 50257, size)
    for name in losses:
        losses[name](ids).backward()
    pairs = zip(ours.parameters(), plain.parameters(), strict=True)
    print(
        "gradients: largest relative difference",
        max(((p.grad - q.grad).norm() / q.grad.norm()).item() for p, q in pairs),
    )
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(rounds + 3):
        ids = torch.randint(0, 50257, size)
        seconds["ours"].append(step("ours", ours, ids))
        seconds["plain"].append(step("plain", plain, ids))
    median = {name: sorted(times[3:])[rounds // 2] for name, times in seconds.items()}  # the first three warm up
    for name, value in median.items():
        print(f"{name:>6} {1e3 * value:7.1f} ms a step, {micro_batch_size * block_size / value:7,.0f} tokens/s")
    print(f"ratio {median['plain'] / median['ours']:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
