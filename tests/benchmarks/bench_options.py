"""Options that might make a training step faster, each switched on and off within one run of `gpt2 fit`. Not a test.

    python tests/benchmarks/bench_options.py [rounds] [configs/quickstart.yaml] [more flags of gpt2 fit]

Each option alternates with the usual training step, in blocks of steps of the same run, so that a noisy machine affects
both alike. Prints by how much the option makes the steps faster (median and quartiles over the pairs of blocks), and on
CUDA the peak memory without and with it. An option is worth keeping if it gains 0.5 % or saves memory. Data loaders are
among the options: several are prepared, each with its own workers, and each block reads from one of them. With
`--trainer.devices 2 --trainer.strategy ddp` options of DDP are tried too. `--only a,b` selects the options whose names
contain one of these words. The last line is the share of the time that the loop waits for data.
"""

import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_fit import OFF, reset_peak
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from gpt2_lightning.__main__ import main
from gpt2_lightning.loss import LinearCrossEntropy, tokens_per_chunk

STEPS_PER_BLOCK, WARM_UP = 10, 3  # the first steps of a block compile or fill caches, and are not counted

Handle = Callable[[torch.Tensor], torch.Tensor]


class Loaders:
    """Several loaders of the same batches; the next batch comes from the one that is in use."""

    def __init__(self, usual: DataLoader[Any]) -> None:
        cuda = torch.cuda.is_available()
        common: dict[str, Any] = {
            name: getattr(usual, name)
            for name in ("collate_fn", "num_workers", "multiprocessing_context", "worker_init_fn", "pin_memory")
        }

        def loader(**changes: Any) -> DataLoader[Any]:
            return DataLoader(usual.dataset, batch_sampler=usual.batch_sampler, **common | changes)

        forked = {"multiprocessing_context": "fork" if sys.platform == "linux" else None}
        self.by_name = {"": usual}
        for workers in (0, 1, 2, 4):
            if workers != usual.num_workers:
                self.by_name[f"data.num_workers={workers}"] = loader(
                    num_workers=workers, multiprocessing_context=forked["multiprocessing_context"] if workers else None
                )
        self.by_name["2 workers, prefetch_factor 8"] = loader(num_workers=2, prefetch_factor=8, **forked)
        if cuda:
            self.by_name["memory not pinned"] = loader(pin_memory=not usual.pin_memory)
        self.in_use = ""

    def __len__(self) -> int:
        return len(self.by_name[""])

    def __iter__(self) -> Iterator[Any]:
        started: dict[str, Iterator[Any]] = {}
        for _ in range(len(self)):
            if self.in_use not in started:  # its workers start when it is first used
                started[self.in_use] = iter(self.by_name[self.in_use])
            yield next(started[self.in_use])

    def switch(self, name: str) -> Callable[[], Callable[[], None]]:
        def on() -> Callable[[], None]:
            self.in_use = name
            return lambda: setattr(self, "in_use", "")

        return on


def ddp_with(trainer: Trainer, **settings: bool) -> Callable[[], Callable[[], None]]:
    """The same module in another DDP wrapper, made anew each time: one with a static graph must not stay idle."""
    strategy: Any = trainer.strategy
    usual = strategy.model

    def on() -> Callable[[], None]:
        strategy.model = DistributedDataParallel(usual.module, device_ids=usual.device_ids, **settings)

        def off() -> None:
            strategy.model = usual
            gc.collect()  # also removes its hooks

        return off

    return on


def options(trainer: Trainer, module: Any, loaders: Loaders) -> dict[str, Callable[[], Callable[[], None]]]:
    """Name of an option → function that switches it on and returns one that switches it off."""
    device_type = trainer.strategy.root_device.type
    usual: Handle = module.next_token_loss
    compiled = hasattr(usual, "_torchdynamo_orig_callable")

    def handle(make: Callable[[], Handle]) -> Callable[[], Callable[[], None]]:
        """Another way to compute the loss, built once, when it is first switched on."""
        made: list[Handle] = []

        def on() -> Callable[[], None]:
            made[:] = made or [make()]
            module.next_token_loss = made[0]
            return lambda: setattr(module, "next_token_loss", usual)

        return on

    def compile_with(**settings: bool) -> Handle:
        return torch.compile(module._next_token_loss, dynamic=False, options=settings)

    def attention(backend: SDPBackend) -> Handle:
        # the backend is chosen during tracing, so each one is compiled by itself
        inner = torch.compile(module._next_token_loss, dynamic=False) if compiled else module._next_token_loss

        def next_token_loss(ids: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return inner(ids)

        return next_token_loss

    def bf16_softmax(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, weight)  # in bf16; autocast would also cast it to fp32 for the softmax
        with torch.autocast(device_type, enabled=False):
            return F.cross_entropy(logits, targets)

    def loss(criterion: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Handle:

        def next_token_loss(ids: torch.Tensor) -> torch.Tensor:
            hidden = module.model.hidden(ids[:, :-1]).flatten(0, 1)
            return criterion(hidden, module.model.lm_head.weight, ids[:, 1:].flatten())

        return torch.compile(next_token_loss, dynamic=False) if compiled else next_token_loss

    def frozen() -> Callable[[], None]:
        gc.collect()
        gc.freeze()
        return gc.unfreeze

    def item_per_micro_batch() -> Callable[[], None]:
        step = module.training_step

        def training_step(batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            result = step(batch, batch_idx)
            result.item()
            return result

        module.training_step = training_step
        return lambda: delattr(module, "training_step")

    def lightnings_broadcast() -> Callable[[], None]:
        loop: Any = trainer.fit_loop.epoch_loop
        ours = loop._broadcast_sigterm_tensor
        loop._broadcast_sigterm_tensor = lambda: _TrainingEpochLoop._broadcast_sigterm_tensor(loop)
        return lambda: setattr(loop, "_broadcast_sigterm_tensor", ours)

    chunk_tokens = tokens_per_chunk(module.model.config.vocab_size)
    chunked = module.loss.chunk_tokens is not None
    found: dict[str, Callable[[], Callable[[], None]]] = {
        "nothing (the noise)": lambda: lambda: None,
        "loss whole" if chunked else "loss in chunks": handle(
            lambda: loss(LinearCrossEntropy(None if chunked else chunk_tokens))
        ),
        "attention as matmuls": handle(lambda: attention(SDPBackend.MATH)),
        "flash attention": handle(lambda: attention(SDPBackend.FLASH_ATTENTION)),
        "garbage collector frozen": frozen,
        "one .item() per micro-batch": item_per_micro_batch,
    }
    found |= {name: loaders.switch(name) for name in loaders.by_name if name}
    if trainer.precision == "bf16-mixed":
        found["the loss's softmax in bf16"] = handle(lambda: loss(bf16_softmax))
    if device_type == "cuda":
        found["cuDNN attention"] = handle(lambda: attention(SDPBackend.CUDNN_ATTENTION))
    if compiled:
        found["eager"] = handle(lambda: module._next_token_loss)
        found["max-autotune-no-cudagraphs"] = handle(lambda: compile_with(max_autotune=True))
        found["coordinate descent"] = handle(lambda: compile_with(coordinate_descent_tuning=True))
    else:
        found["compile"] = handle(lambda: torch.compile(module._next_token_loss, dynamic=False))
    if trainer.world_size > 1:
        found["Lightning's broadcast per micro-batch"] = lightnings_broadcast
        as_views = trainer.strategy.model.gradient_as_bucket_view  # type: ignore[union-attr]
        found[f"gradient_as_bucket_view={not as_views}"] = ddp_with(trainer, gradient_as_bucket_view=not as_views)
        if trainer.accumulate_grad_batches == 1:  # torch asserts if no_sync precedes the first synchronised backward
            found["static_graph"] = ddp_with(trainer, gradient_as_bucket_view=as_views, static_graph=True)
    return found


class Alternate(Callback):
    """Block by block: the usual step, an option, the usual step, the next option …"""

    def __init__(self, rounds: int, only: str = "") -> None:
        self.rounds = rounds
        self.only = only.split(",")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        make = data.train_dataloader

        def train_dataloader() -> Loaders:
            self.loaders = Loaders(make())
            return self.loaders

        data.train_dataloader = train_dataloader

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = options(trainer, pl_module, self.loaders)
        self.options = {name: on for name, on in found.items() if any(word in name for word in self.only)}
        self.peaks = {name: [0, 0] for name in self.options}  # bytes, without it and with it
        self.queue = [name for _ in range(self.rounds) for name in self.options for name in (None, name)]
        self.seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in self.options}
        self.off: Callable[[], None] = lambda: None
        self.usual = 0.0
        self.waited = self.whole = 0.0
        self.ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.ended  # since the end of the last batch: loader and transfer

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, rest = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        block, step = divmod(steps, STEPS_PER_BLOCK)
        if rest == 0 and step in (0, WARM_UP):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            if step == WARM_UP:
                self.began = now
                reset_peak()
            elif block > 1:
                self._note(self.queue[block - 2], now - self.began)
            if step == 0:
                self.off()
                trainer.should_stop = block > len(self.queue)
                name = None if trainer.should_stop else self.queue[block - 1]
                self.off = self.options[name]() if name else lambda: None
        now = time.perf_counter()
        self.whole += now - self.ended
        self.ended = now

    def _note(self, name: str | None, seconds: float) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        if name is None:
            self.usual, self.usual_peak = seconds, peak
        else:
            self.seconds[name].append((self.usual, seconds))
            self.peaks[name] = [self.usual_peak, peak]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        print(f"\n{'':40}{'faster by':>10}   quartiles")
        for name, pairs in self.seconds.items():
            gains = [usual / with_it - 1 for usual, with_it in pairs]
            low, median, high = statistics.quantiles(gains, n=4) if len(gains) > 1 else gains * 3
            without, with_it = (peak / 2**30 for peak in self.peaks[name])
            memory = f"   {without:.2f} → {with_it:.2f} GiB" if with_it else ""
            print(f"{name:40}{median:+10.1%}   {low:+.1%} to {high:+.1%}{memory}")
        print(f"waiting for data: {self.waited / self.whole:.2%} of the time")


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    recipe = sys.argv[2] if len(sys.argv) > 2 else "configs/quickstart.yaml"
    with tempfile.TemporaryDirectory() as run_dir:
        more = sys.argv[3:]
        callback = ["--trainer.callbacks+=bench_options.Alternate", f"--trainer.callbacks.rounds={rounds}"]
        if "--only" in more:
            at = more.index("--only")
            callback.append(f"--trainer.callbacks.only={more[at + 1]}")
            del more[at : at + 2]
        flags = ["--trainer.max_steps=100000", *OFF, f"--run_dir={run_dir}/run", *callback]
        raise SystemExit(main(["fit", f"--config={recipe}", *flags, *more]))
