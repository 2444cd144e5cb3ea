"""`gpt2 fit` beside a raw loop of ours and build-nanogpt's plain loop, alternating in one run. Not a test.

    python tests/benchmarks/bench_fit.py [blocks] [configs/quickstart.yaml] [more flags of gpt2 fit]

The Trainer runs the recipe with everything that `gpt2 fit` adds, logging each step; evaluation and saving are off.
After each block of its steps the other loops make as many, with copies of the model and the same batches. "raw" is what
the Trainer does: our loss and AdamW, clipping, schedule, one `.item()` a step. "plain" is build-nanogpt's loop: whole
logits, returned by the forward pass, F.cross_entropy, and torch's AdamW, which is fused on CUDA; in the recipe's
precision and, if that is not bf16, once more in bf16 autocast, which its script uses on any device. If the recipe
compiles, all loops do. Prints ms per step and tokens/s (medians over the steps), and the ratios of the rates by blocks.
On one GPU of 80 GB, with B=64, T=1024 as in published figures:

    python tests/benchmarks/bench_fit.py 20 configs/gpt2_124m.yaml --trainer.devices 1 --trainer.strategy auto \
        --data.source stdlib --data.root data/stdlib --data.total_batch_tokens 65536

That counts 200 steps of each. Memory there: four bytes each for a weight, its gradient and AdamW's two moments are
16 · 124M = 2 GB per loop; beside them only the active loop holds activations, of which the logits' 6.6 GB in bf16 is
the largest tensor. The last column is the measured peak.
"""

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_lightning.__main__ import main
from gpt2_lightning.hardware import math_attention_is_faster
from gpt2_lightning.loss import LinearCrossEntropy
from gpt2_lightning.model import GPT
from gpt2_lightning.optim import AdamW, decay_groups
from gpt2_lightning.schedule import WarmupCosine

STEPS_PER_BLOCK = 10
SETTINGS: dict[str, Any] = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
OFF = [f"--{section}.every_n_steps=0" for section in ("validation", "hellaswag", "samples", "checkpoint")]
LossOf = Callable[[GPT, Tensor], tuple[Any, Tensor]]  # ids (B, T+1) → what else the forward pass returns, and the loss


class Loop:
    """A raw training loop: ``loss_of(model, ids)``, clipping, AdamW, cosine."""

    def __init__(self, trainer: Trainer, optimizer: torch.optim.Optimizer, model: GPT, loss_of: LossOf, bf16: bool):
        self.model, self.loss_of, self.optimizer = model, loss_of, optimizer
        self.device, self.accumulate = trainer.strategy.root_device, trainer.accumulate_grad_batches
        self.autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)
        self.scheduler = WarmupCosine(optimizer, 1, trainer.max_steps, 3e-4)
        self.batches: Iterator[Tensor] = iter(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]

    def step(self) -> float:
        """Make a step and return its seconds."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for _ in range(self.accumulate):
            ids = next(self.batches).to(self.device, non_blocking=True).long()
            with self.autocast:
                _logits, loss = self.loss_of(self.model, ids)  # held until the next ones, as in build-nanogpt's loop
            (loss / self.accumulate).backward()
            total += loss.detach() / self.accumulate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        total.item()  # waits for the device
        return time.perf_counter() - started


def plain_loss(model: GPT, ids: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(ids[:, :-1])  # (B, T, V)
    return logits, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def other_loops(trainer: Trainer, module: Any) -> dict[str, Loop]:
    criterion = LinearCrossEntropy(module.loss.chunk_tokens)
    bf16 = trainer.precision == "bf16-mixed"
    compiled = hasattr(module.next_token_loss, "_torchdynamo_orig_callable")

    def our_loss(model: GPT, ids: Tensor) -> tuple[None, Tensor]:
        hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
        return None, criterion(hidden, model.lm_head.weight, ids[:, 1:].flatten())

    if math_attention_is_faster(trainer.strategy.root_device.type, bf16, module.model.config.block_size):
        our_loss = sdpa_kernel(SDPBackend.MATH)(our_loss)

    def loop(loss_of: LossOf, ours: bool, bf16: bool) -> Loop:
        model = copy.deepcopy(module.model)
        groups = decay_groups(model.named_parameters())
        fused = True if model.lm_head.weight.is_cuda else None  # as in build-nanogpt's script
        optimizer = AdamW(groups, **SETTINGS) if ours else torch.optim.AdamW(groups, fused=fused, **SETTINGS)

        def own_loss_of(model: GPT, ids: Tensor) -> tuple[Any, Tensor]:  # compiled for this loop alone
            return loss_of(model, ids)

        compiled_loss_of: Any = torch.compile(own_loss_of, dynamic=False) if compiled else own_loss_of
        return Loop(trainer, optimizer, model, compiled_loss_of, bf16)

    loops = {"raw": loop(our_loss, True, bf16), "plain": loop(plain_loss, False, bf16)}
    return loops if bf16 else loops | {"plain, in bf16": loop(plain_loss, False, True)}


class Alternate(Callback):
    """Times blocks of the Trainer's steps, and of the other loops' in between."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loops = other_loops(trainer, pl_module)
        self.blocks: list[dict[str, list[float]]] = []  # of each: name of the loop → seconds of its steps
        self.peaks = dict.fromkeys(("Trainer", *self.loops), 0)
        self.seconds: list[float] = []  # of the Trainer's steps in this block
        reset_peak()
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        if rest:
            return
        block_ends = step % STEPS_PER_BLOCK == 0
        if block_ends and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.started)
        self.started = now
        if block_ends:
            block = {"Trainer": self.seconds}
            self._note_peak("Trainer")
            for name, loop in self.loops.items():
                block[name] = [loop.step() for _ in range(STEPS_PER_BLOCK)]
                self._note_peak(name)
            self.blocks.append(block)
            self.seconds = []
            self.started = time.perf_counter()

    def _note_peak(self, name: str) -> None:
        if torch.cuda.is_available():
            self.peaks[name] = max(self.peaks[name], torch.cuda.max_memory_allocated())
        reset_peak()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        blocks = self.blocks[1:]  # the first block compiles and warms up
        tokens = trainer.datamodule.total_batch_tokens  # type: ignore[attr-defined]
        print(f"\n{len(blocks) * STEPS_PER_BLOCK} steps of {tokens:,} tokens; medians of the steps:")
        for name, peak in self.peaks.items():
            seconds = statistics.median(second for block in blocks for second in block[name])
            memory = f"{peak / 2**30:8.1f} GiB" if peak else ""
            print(f"{name:>30} {1e3 * seconds:8.1f} ms {tokens / seconds:10,.0f} tokens/s{memory}")
        print("the Trainer's rate over that of a loop; median of the blocks (quartiles), and over all steps:")
        for name in self.loops:
            sums = [(sum(block[name]), sum(block["Trainer"])) for block in blocks]
            ratios = sorted(theirs / ours for theirs, ours in sums)
            low, median, high = (ratios[len(ratios) * quarter // 4] for quarter in (1, 2, 3))
            whole = sum(theirs for theirs, _ in sums) / sum(ours for _, ours in sums)
            print(f"{name:>30} {median:8.3f} ({low:.3f} to {high:.3f}) {whole:8.3f}")


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    recipe = sys.argv[2] if len(sys.argv) > 2 else "configs/quickstart.yaml"
    steps = f"--trainer.max_steps={(blocks + 1) * STEPS_PER_BLOCK}"
    with tempfile.TemporaryDirectory() as run_dir:
        flags = [steps, *OFF, f"--run_dir={run_dir}/run", "--trainer.callbacks+=bench_fit.Alternate"]
        raise SystemExit(main(["fit", f"--config={recipe}", *flags, *sys.argv[3:]]))
