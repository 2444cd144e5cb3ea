"""``gpt2 bench``: the video's ladder of speed on this machine, this package's own rungs on top, beside the limits.

Every rung times the same training step, one micro-batch: forward, loss, backward, clipping, AdamW. Each keeps what
those below it changed, except for the rungs on trial. The last is that step inside the Trainer, on shards, with the
callbacks and loggers that `gpt2 fit` has.
"""

import contextlib
import gc
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_lightning.callbacks.checkpoint import StepCheckpoint
from gpt2_lightning.callbacks.hellaswag import HellaSwag
from gpt2_lightning.callbacks.log_txt import LogTxt
from gpt2_lightning.callbacks.nonfinite import NonFinite
from gpt2_lightning.callbacks.progress import StepProgressBar
from gpt2_lightning.callbacks.samples import Samples
from gpt2_lightning.callbacks.signals import stop_signal
from gpt2_lightning.callbacks.validation import ValidationLoss
from gpt2_lightning.cli.launchers import TRAINER_DEFAULTS, keep_freed_memory, run_callbacks, silence_libraries
from gpt2_lightning.compile_cache import keep_compiled_code
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.data.shards import write_shard
from gpt2_lightning.loss import LinearCrossEntropy, chunk_of
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.module import GPTModule, attends_by_matmuls
from gpt2_lightning.optim import AdamW, decay_groups
from gpt2_lightning.tokenizer import VOCAB_SIZE
from gpt2_lightning.tools.gpus import is_out_of_memory

WARM_UP, STEPS = 3, 12


@dataclass(frozen=True)
class Setup:
    """How a step is computed; as it stands, the plainest way."""

    tf32: bool = False
    bf16: bool = False
    compile: bool = False
    flash: bool = False
    padded: bool = False
    fused: bool = False
    larger: bool = False
    chunked: bool = False
    memory: bool = False
    cudnn: bool = False
    autotune: bool = False


@dataclass(frozen=True)
class Rung:
    name: str
    title: str
    change: dict[str, bool]
    a100_ms: float | None = None
    """The video's figure: one A100, 16 sequences of 1,024 tokens."""
    on_trial: bool = False
    """Timed on top of those below it, and left out of those above: not what ``gpt2 fit`` does."""


RUNGS = (
    Rung("fp32", "fp32, attention as matmuls", {}, 1000.0),
    Rung("tf32", "TF32 matmuls", {"tf32": True}, 333.0),
    Rung("bf16", "bf16 autocast", {"bf16": True}, 300.0),
    Rung("compile", "torch.compile", {"compile": True}, 130.0),
    Rung("flash", "fused attention", {"flash": True}, 96.0),
    Rung("vocab", "vocabulary 50257 → 50304", {"padded": True}, 93.0),
    Rung("fused", "fused AdamW", {"fused": True}, 90.0),
    Rung("larger", "4 × the micro-batch", {"larger": True}),  # of 16: the recipe's 64
    # its loop over chunks is nothing that a compiler could fuse: on a CPU it is faster alone than the two together
    Rung("chunked", "loss in chunks, eager", {"chunked": True, "compile": False}),
    Rung("matmuls", "attention as matmuls again", {"flash": False}),
    Rung("memory", "freed memory kept", {"memory": True}),
    Rung("cudnn", "cuDNN attention (trial)", {"cudnn": True}, on_trial=True),
    Rung("autotune", "autotuned compile (trial)", {"autotune": True}, on_trial=True),
    Rung("trainer", "the same in the Trainer", {}),
)


@dataclass(frozen=True)
class Timing:
    """Of one rung: seconds per micro-batch, its sequences, and the most memory in bytes, where the system tells."""

    median: float
    low: float
    high: float
    micro_batch_size: int
    peak_memory: int | None


def cannot(rung: Rung, device: torch.device, block_size: int) -> str | None:
    """Why a device has no such rung, or None."""
    cuda, cpu = device.type == "cuda", device.type == "cpu"
    match rung.name:
        case "tf32" if not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
            return "no TF32 on this device"
        case "bf16" if not (_has_bf16() if cuda else cpu and _has_bf16_products()):
            return "no fast bf16 on this device"
        case "compile" | "autotune" if device.type == "mps" or sys.platform == "win32":
            return "not worth using here"
        case "compile" if cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "no C++ compiler"
        case "larger" if not cuda:
            return "no faster here"
        case "chunked" if not cpu:
            return "saves memory, not time, on a GPU: model.chunked_loss"
        case "matmuls" if not attends_by_matmuls(device.type, _has_bf16_products(), block_size):
            return "fused attention is faster here"
        case "memory" if not (cpu and sys.platform == "linux"):
            return "of no use here"
        case "cudnn" if not (cuda and _has_bf16() and _has_cudnn_attention(device)):
            return "no cuDNN attention on this device"
        case "autotune" if cpu:
            return "the step is not compiled here"
    return None


def _has_bf16_products() -> bool:
    """Of a CPU; one without such instructions would lose more in casts than it gains."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def _has_cudnn_attention(device: torch.device) -> bool:
    q = torch.zeros(1, 1, 128, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    except RuntimeError:
        return False
    return True


def climb(
    config: GPTConfig, micro_batch_size: int, device: torch.device, names: list[str]
) -> Iterator[tuple[Rung, Timing | str]]:
    """Times the rungs of these names in order; for one that the device cannot do, the reason."""
    kept = Setup()
    for rung in RUNGS:
        reason = cannot(rung, device, config.block_size)
        setup = replace(kept, **rung.change) if reason is None else kept
        if not rung.on_trial:
            kept = setup
        if rung.name in names:
            yield rung, reason or _time(rung, setup, config, micro_batch_size, device)


def _time(rung: Rung, setup: Setup, config: GPTConfig, micro_batch_size: int, device: torch.device) -> Timing | str:
    """The timing of one rung on the micro-batch asked for, or on the first half of a half … of it that fits."""
    shape = replace(config, vocab_size=config.vocab_size if setup.padded else VOCAB_SIZE)
    torch.set_float32_matmul_precision("high" if setup.tf32 else "highest")
    if setup.compile:
        keep_compiled_code()
    if setup.memory:
        keep_freed_memory()
    size = 4 * micro_batch_size if setup.larger else micro_batch_size
    run = _in_the_trainer if rung.name == "trainer" else _by_hand
    while size >= 1:
        torch.compiler.reset()
        _free(device)
        _reset_peak(device)
        seconds = _unless_out_of_memory(partial(run, setup, shape, size, device))
        if seconds is not None:
            seconds.sort()
            low, median, high = (seconds[len(seconds) * quarter // 4] for quarter in (1, 2, 3))
            return Timing(median, low, high, size, _peak(device))
        size //= 2
    return "does not fit"


def _unless_out_of_memory(run: Callable[[], list[float]]) -> list[float] | None:
    try:
        return run()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None  # outside the handler, whose traceback holds the activations


@contextmanager
def _attention(setup: Setup) -> Iterator[None]:
    """Before the rung of fused attention, the same call computed as matmuls and a softmax."""
    choice = SDPBackend.CUDNN_ATTENTION if setup.cudnn else None if setup.flash else SDPBackend.MATH
    with nullcontext() if choice is None else sdpa_kernel(choice):
        yield


def _by_hand(setup: Setup, config: GPTConfig, micro_batch_size: int, device: torch.device) -> list[float]:
    """Seconds of each step in a plain loop."""
    torch.manual_seed(0)
    model = GPT(config).to(device)
    groups = decay_groups(model.named_parameters())
    settings: dict[str, Any] = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamW(groups, **settings) if setup.fused else torch.optim.AdamW(groups, **settings)
    criterion = LinearCrossEntropy(chunk_of(config.vocab_size) if setup.chunked else None)

    def next_token_loss(ids: Tensor) -> Tensor:
        hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
        return criterion(hidden, model.lm_head.weight, ids[:, 1:].flatten())

    tuning: Any = {"max_autotune": True, "coordinate_descent_tuning": True} if setup.autotune else None
    loss_of = torch.compile(next_token_loss, dynamic=False, options=tuning) if setup.compile else next_token_loss
    seconds = []
    with _attention(setup):
        for _ in range(WARM_UP + STEPS):
            ids = torch.randint(0, VOCAB_SIZE, (micro_batch_size, config.block_size + 1)).to(device)
            _synchronize(device)
            started = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=setup.bf16):
                loss = loss_of(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()  # as a loop that logs does
            _synchronize(device)
            seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


class _Stopwatch(Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(time.perf_counter())  # StepMetrics, before it, has waited for the device


def _in_the_trainer(setup: Setup, config: GPTConfig, micro_batch_size: int, device: torch.device) -> list[float]:
    """Seconds of each step of a run as ``gpt2 fit`` makes it, logging every step; evaluation and saving are not due."""
    silence_libraries()
    watch = _Stopwatch()
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 2_000_000, dtype=np.uint16)
    cuda = device.type == "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shard(folder / "random_val_000000.npy", tokens[: 10 * config.block_size])
        write_shard(folder / "random_train_000001.npy", tokens)
        data = TokenDataModule(
            root=name,
            source=None,
            total_batch_tokens=micro_batch_size * config.block_size,
            micro_batch_size=micro_batch_size,
            num_workers=2 if cuda else 0,  # as the recipes have it
        )
        trainer = Trainer(
            accelerator="gpu" if cuda else device.type,
            devices=1,
            precision="bf16-mixed" if setup.bf16 else "32-true",
            max_steps=WARM_UP + STEPS,
            default_root_dir=name,
            logger=[TensorBoardLogger(name, default_hp_metric=False), LogTxt(folder)],
            callbacks=[
                StepProgressBar(),
                *run_callbacks(),
                *(ValidationLoss(0), HellaSwag(0), Samples(0), NonFinite(), StepCheckpoint(0)),
                watch,
            ],
            **TRAINER_DEFAULTS,
        )
        unseen = io.StringIO()  # the bar is drawn, but not into the table; how fast a terminal is, is not the point
        with _attention(setup), contextlib.redirect_stderr(unseen), contextlib.redirect_stdout(unseen):
            trainer.fit(GPTModule(config, compile=setup.compile, chunked_loss=setup.chunked), data)
    if stop_signal(trainer):
        raise KeyboardInterrupt
    return [end - begin for begin, end in zip(watch.ends, watch.ends[1:], strict=False)][WARM_UP - 1 :]


def limits(device: torch.device, bf16: bool) -> dict[str, float]:
    """What the machine gives when nothing else is in the way: FLOP/s of a large matmul, bytes/s of a large copy."""
    large = device.type == "cuda"
    n, megabytes = (8192, 1024) if large else (2048, 256)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return {
        "matmul_flops": 2 * n**3 / _best(lambda: a @ a, device),
        "copy_bytes_per_sec": 2 * source.nbytes / _best(lambda: target.copy_(source), device),
    }


def _best(what: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(10):
        _synchronize(device)
        started = time.perf_counter()
        what()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to start the process's peak anew


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return None


def default_shape(device: torch.device) -> tuple[GPTConfig, int]:
    """What is timed if nothing else is asked for: the video's 124M and 16 sequences, or quickstart's on a CPU."""
    if device.type == "cpu":
        return GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=64), 4
    return GPTConfig(), 16
