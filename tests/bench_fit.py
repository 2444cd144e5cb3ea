"""`gpt2 fit` against a raw loop of ours and the plain loop of the video, in turn, in one run. Not a test.

    python tests/bench_fit.py [blocks] [configs/quickstart.yaml] [more flags of gpt2 fit]

The Trainer runs the recipe with all that `gpt2 fit` puts into it, logging every step; evaluation and saving are off.
After each block of its steps two loops make as many on copies of the model, on the same batches. The raw one does what
the Trainer does: our loss and AdamW, clipping, schedule, one `.item()` a step. The plain one is build-nanogpt's: whole
logits, F.cross_entropy, AdamW as torch has it by default, and bf16 autocast if the recipe has it (its script always
does). Printed are the ratios of the rates, block by block.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from gpt2_lightning.__main__ import main
from gpt2_lightning.loss import LinearCrossEntropy
from gpt2_lightning.model import GPT
from gpt2_lightning.optim import AdamW, decay_groups
from gpt2_lightning.schedule import WarmupCosine

STEPS_PER_BLOCK = 10
SETTINGS: dict[str, Any] = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Loop:
    """A raw training loop: ``loss_of(model, ids)``, clipping, AdamW, cosine."""

    def __init__(
        self,
        model: GPT,
        optimizer: type[torch.optim.Optimizer],
        loss_of: Callable[[GPT, Tensor], Tensor],
        trainer: Trainer,
    ) -> None:
        self.model, self.loss_of, self.accumulate = model, loss_of, trainer.accumulate_grad_batches
        self.autocast = torch.autocast(
            trainer.strategy.root_device.type, dtype=torch.bfloat16, enabled=trainer.precision == "bf16-mixed"
        )
        self.optimizer = optimizer(decay_groups(model.named_parameters()), **SETTINGS)
        self.scheduler = WarmupCosine(self.optimizer, 40, trainer.max_steps, 3e-4)

    def step(self, batches: list[Tensor]) -> None:
        self.optimizer.zero_grad()
        total = torch.zeros((), device=batches[0].device)
        for batch in batches:
            with self.autocast:
                loss = self.loss_of(self.model, batch.long())
            (loss / self.accumulate).backward()
            total += loss.detach() / self.accumulate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        total.item()


def plain_loss(model: GPT, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


class LoopsBeside(Callback):
    """Times blocks of the Trainer's steps, and of the two loops' between them."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        criterion = LinearCrossEntropy(module.loss.chunk_tokens)

        def our_loss(model: GPT, ids: Tensor) -> Tensor:
            return criterion(model.hidden(ids[:, :-1]).flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten())

        compiled = not hasattr(module.next_token_loss, "__func__")  # a compiled handle, not the method
        ours, plain = (torch.compile(f) if compiled else f for f in (our_loss, plain_loss))
        self.loops = {
            "raw": Loop(copy.deepcopy(module.model), AdamW, ours, trainer),
            "plain": Loop(copy.deepcopy(module.model), torch.optim.AdamW, plain, trainer),
        }
        self.batches = iter(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        self.seconds: list[dict[str, float]] = []
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulate = trainer.accumulate_grad_batches
        if (batch_idx + 1) % (STEPS_PER_BLOCK * accumulate) != 0:
            return
        _synchronize()
        block = {"Trainer": time.perf_counter() - self.started}
        for name, loop in self.loops.items():
            began = time.perf_counter()
            for _ in range(STEPS_PER_BLOCK):  # each reads its batches, as the Trainer does
                loop.step([next(self.batches).to(pl_module.device) for _ in range(accumulate)])
            _synchronize()
            block[name] = time.perf_counter() - began
        self.seconds.append(block)
        self.started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        blocks = self.seconds[1:]  # the first block warms up
        steps = STEPS_PER_BLOCK * len(blocks)
        tokens = trainer.datamodule.total_batch_tokens  # type: ignore[attr-defined]
        for name in blocks[0]:
            seconds = sum(block[name] for block in blocks) / steps
            print(f"{name:>8} {1e3 * seconds:8.1f} ms a step {tokens / seconds:10,.0f} tokens/s")
        for name in self.loops:
            ratios = sorted(block[name] / block["Trainer"] for block in blocks)
            low, median, high = (ratios[len(ratios) * quarter // 4] for quarter in (1, 2, 3))
            whole = sum(block[name] for block in blocks) / sum(block["Trainer"] for block in blocks)
            print(
                f"the Trainer's rate over the {name} loop's: {whole:.3f} over {steps} steps, "
                f"of the blocks {median:.3f} (quartiles {low:.3f} to {high:.3f})"
            )


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    recipe = sys.argv[2] if len(sys.argv) > 2 else "configs/quickstart.yaml"
    off = [f"--{section}.every_n_steps=0" for section in ("validation", "hellaswag", "samples", "checkpoint")]
    steps = f"--trainer.max_steps={(blocks + 1) * STEPS_PER_BLOCK}"
    with tempfile.TemporaryDirectory() as run_dir:
        flags = [steps, *off, f"--run_dir={run_dir}/run", "--trainer.callbacks+=bench_fit.LoopsBeside"]
        raise SystemExit(main(["fit", f"--config={recipe}", *flags, *sys.argv[3:]]))
