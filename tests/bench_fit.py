"""Lightning's loop against a raw one, in turn, in one run. Not a test.

    python tests/bench_fit.py [blocks] [configs/quickstart.yaml] [more flags of gpt2 fit]

The Trainer runs the recipe with all that `gpt2 fit` puts into it, logging every step; evaluation and saving are off.
After each block of its steps a plain loop makes as many on a copy of the model: the same loader, loss, clipping, AdamW
and schedule, and one `.item()` a step. Printed is the ratio of the two rates, block by block.
"""

import copy
import sys
import tempfile
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.__main__ import main
from gpt2_lightning.loss import LinearCrossEntropy
from gpt2_lightning.optim import AdamW, decay_groups
from gpt2_lightning.schedule import WarmupCosine

STEPS_PER_BLOCK = 20


class RawLoopBeside(Callback):
    """Times blocks of the Trainer's steps, and of the raw loop's between them."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self.model = copy.deepcopy(module.model)
        self.loss = LinearCrossEntropy(module.loss.chunk_tokens)
        self.optimizer = AdamW(decay_groups(self.model.named_parameters()), lr=6e-3)
        self.scheduler = WarmupCosine(self.optimizer, 40, trainer.max_steps, 3e-4)
        self.batches = iter(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        self.seconds: list[tuple[float, float]] = []
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        accumulate = trainer.accumulate_grad_batches
        if (batch_idx + 1) % (STEPS_PER_BLOCK * accumulate) != 0:
            return
        ended = time.perf_counter()
        for _ in range(STEPS_PER_BLOCK):
            self._step(accumulate)
        self.seconds.append((ended - self.started, time.perf_counter() - ended))
        self.started = time.perf_counter()

    def _step(self, accumulate: int) -> None:
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for _ in range(accumulate):
            ids = next(self.batches).long()
            hidden = self.model.hidden(ids[:, :-1]).flatten(0, 1)
            loss = self.loss(hidden, self.model.lm_head.weight, ids[:, 1:].flatten()) / accumulate
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        total.item()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = self.seconds[1:]  # the first block warms up
        ratios = sorted(raw / lightning for lightning, raw in seconds)
        low, median, high = (ratios[len(ratios) * quarter // 4] for quarter in (1, 2, 3))
        lightning, raw = (sum(column) for column in zip(*seconds, strict=True))
        steps = STEPS_PER_BLOCK * len(seconds)
        print(
            f"{steps} steps each: Trainer {1e3 * lightning / steps:.1f} ms, raw {1e3 * raw / steps:.1f} ms a step; the "
            f"Trainer's rate over the raw loop's: {raw / lightning:.3f} in all, of the blocks {median:.3f} "
            f"(quartiles {low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    blocks = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    recipe = sys.argv[2] if len(sys.argv) > 2 else "configs/quickstart.yaml"
    off = [f"--{section}.every_n_steps=0" for section in ("validation", "hellaswag", "samples", "checkpoint")]
    steps = f"--trainer.max_steps={(blocks + 1) * STEPS_PER_BLOCK}"
    with tempfile.TemporaryDirectory() as run_dir:
        flags = [steps, *off, f"--run_dir={run_dir}/run", "--trainer.callbacks+=bench_fit.RawLoopBeside"]
        raise SystemExit(main(["fit", f"--config={recipe}", *flags, *sys.argv[3:]]))
