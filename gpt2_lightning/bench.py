"""``gpt2 bench``: the video's ladder of speed on this machine, this package's own rungs on top, beside the limits.

Every rung times the same training step, one micro-batch: forward, loss, backward, clipping, AdamW. Each keeps what
those below it changed. The last is that step inside the Trainer, on shards, with the callbacks that `gpt2 fit` has.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_lightning.callbacks.metrics import StepMetrics
from gpt2_lightning.callbacks.nonfinite import NonFinite
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.data.shards import write_shard
from gpt2_lightning.gpus import peak_flops
from gpt2_lightning.job import TRAINER_DEFAULTS, quieten
from gpt2_lightning.loss import LinearCrossEntropy
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.module import CHUNK_LOGITS, GPTModule
from gpt2_lightning.optim import AdamW, decay_groups
from gpt2_lightning.tokenizer import VOCAB_SIZE

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
    chunked: bool = False


@dataclass(frozen=True)
class Rung:
    name: str
    title: str
    change: dict[str, bool]
    a100_ms: float | None = None
    """The video's figure: one A100, 16 sequences of 1,024 tokens."""


RUNGS = (
    Rung("fp32", "fp32, attention as matmuls", {}, 1000.0),
    Rung("tf32", "TF32 matmuls", {"tf32": True}, 333.0),
    Rung("bf16", "bf16 autocast", {"bf16": True}, 300.0),
    Rung("compile", "torch.compile", {"compile": True}, 130.0),
    Rung("flash", "fused attention", {"flash": True}, 96.0),
    Rung("vocab", "vocabulary 50257 → 50304", {"padded": True}, 93.0),
    Rung("fused", "fused AdamW", {"fused": True}, 90.0),
    # its loop over chunks is nothing that a compiler could fuse: on a CPU it is faster alone than the two together
    Rung("chunked", "loss in chunks, eager", {"chunked": True, "compile": False}),
    Rung("trainer", "the same in the Trainer", {}),
)


@dataclass(frozen=True)
class Timing:
    """Of one rung: seconds per micro-batch, and the most memory it took, in bytes, where the system tells."""

    median: float
    low: float
    high: float
    peak_memory: int | None


def cannot(rung: Rung, device: torch.device) -> str | None:
    """Why a device has no such rung, or None."""
    cuda, cpu = device.type == "cuda", device.type == "cpu"
    if rung.name == "tf32" and not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        return "no TF32 on this device"
    if rung.name == "bf16" and not (torch.cuda.is_bf16_supported() if cuda else cpu and _fast_bf16()):
        return "no fast bf16 on this device"
    if rung.name == "compile" and (device.type == "mps" or sys.platform == "win32"):
        return "not worth using here"
    if rung.name == "compile" and cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler"
    if rung.name == "chunked" and cuda:
        return "saves memory, not time, on a GPU: model.chunked_loss"
    return None


def _fast_bf16() -> bool:
    return torch.cpu._is_amx_tile_supported()  # without AMX the casts cost more than the products gain


def climb(
    config: GPTConfig, micro_batch_size: int, device: torch.device, names: list[str]
) -> Iterator[tuple[Rung, Timing | str]]:
    """Times the rungs of these names in order; for one that the device cannot do, the reason."""
    setup = Setup()
    for rung in RUNGS:
        reason = cannot(rung, device)
        if reason is None:
            setup = replace(setup, **rung.change)
        if rung.name not in names:
            continue
        if reason is not None:
            yield rung, reason
            continue
        shape = replace(config, vocab_size=config.vocab_size if setup.padded else VOCAB_SIZE)
        torch.set_float32_matmul_precision("high" if setup.tf32 else "highest")
        if setup.compile:
            torch.compiler.reset()
        _reset_peak(device)
        run = _in_the_trainer if rung.name == "trainer" else _by_hand
        seconds = sorted(run(setup, shape, micro_batch_size, device))
        low, median, high = (seconds[len(seconds) * quarter // 4] for quarter in (1, 2, 3))
        yield rung, Timing(median, low, high, _peak(device))


@contextmanager
def _attention(setup: Setup) -> Iterator[None]:
    """Before the rung of fused attention, the same call computed as matmuls and a softmax."""
    with nullcontext() if setup.flash else sdpa_kernel(SDPBackend.MATH):
        yield


def _by_hand(setup: Setup, config: GPTConfig, micro_batch_size: int, device: torch.device) -> list[float]:
    """Seconds of each step in a plain loop."""
    torch.manual_seed(0)
    model = GPT(config).to(device)
    groups = decay_groups(model.named_parameters())
    settings: dict[str, Any] = {"lr": 6e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamW(groups, **settings) if setup.fused else torch.optim.AdamW(groups, **settings)
    criterion = LinearCrossEntropy(max(1, CHUNK_LOGITS // config.vocab_size) if setup.chunked else None)

    def next_token_loss(ids: Tensor) -> Tensor:
        hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
        return criterion(hidden, model.lm_head.weight, ids[:, 1:].flatten())

    loss_of = torch.compile(next_token_loss, dynamic=False) if setup.compile else next_token_loss
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
    """Seconds of each step of a run as ``gpt2 fit`` makes it, logging every step."""
    quieten()
    watch = _Stopwatch()
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 2_000_000, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "random_val_000000.npy", tokens[: 10 * config.block_size])
        write_shard(Path(folder) / "random_train_000001.npy", tokens)
        data = TokenDataModule(
            root=folder,
            source=None,
            total_batch_tokens=micro_batch_size * config.block_size,
            micro_batch_size=micro_batch_size,
        )
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1,
            precision="bf16-mixed" if setup.bf16 else "32-true",
            max_steps=WARM_UP + STEPS,
            logger=TensorBoardLogger(folder, default_hp_metric=False),
            callbacks=[StepMetrics(), NonFinite(), watch],
            enable_progress_bar=False,
            enable_checkpointing=False,
            **TRAINER_DEFAULTS,
        )
        with _attention(setup):
            trainer.fit(GPTModule(config, compile=setup.compile, chunked_loss=setup.chunked), data)
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


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
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


HEAD = f"{'':28}{'ms':>9} {'quartiles':>17} {'tokens/s':>11} {'faster':>8} {'MFU':>6} {'memory':>9} {'A100, video':>12}"


def _line(rung: dict[str, Any]) -> str:
    if "skipped" in rung:
        return f"{rung['title']:28}{'skipped: ' + rung['skipped']}"
    mfu = f"{rung['mfu']:.1%}" if rung["mfu"] else "-"
    memory = f"{rung['peak_memory_bytes'] / 2**30:.2f} GiB" if rung["peak_memory_bytes"] else "-"
    video = f"{rung['a100_ms']:.0f} ms" if rung["a100_ms"] else "-"
    quartiles = f"{rung['ms_low']:8.1f}-{rung['ms_high']:<8.1f}"
    return (
        f"{rung['title']:28}{rung['ms']:9.1f} {quartiles} {rung['tokens_per_sec']:11,.0f} "
        f"{rung['times_faster']:7.2f}x {mfu:>6} {memory:>9} {video:>12}"
    )


def measure(
    config: GPTConfig, micro_batch_size: int, device: torch.device, names: list[str], table: TextIO
) -> dict[str, Any]:
    """The ladder and the limits as one plain object, and as a ``table`` that grows while it climbs."""
    tokens, flops = micro_batch_size * config.block_size, GPT(config).flops_per_token()
    rungs: list[dict[str, Any]] = []
    first = None
    shape = asdict(config) | {"micro_batch_size": micro_batch_size}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}: {', '.join(f'{key}={value}' for key, value in shape.items())}\n{HEAD}", file=table, flush=True)
    for rung, timing in climb(config, micro_batch_size, device, names):
        entry: dict[str, Any] = {"name": rung.name, "title": rung.title, "a100_ms": rung.a100_ms}
        if isinstance(timing, str):
            entry["skipped"] = timing
        else:
            first = first or timing.median
            rate, peak = tokens / timing.median, peak_flops(device)
            entry |= {
                "ms": 1e3 * timing.median,
                "ms_low": 1e3 * timing.low,
                "ms_high": 1e3 * timing.high,
                "tokens_per_sec": rate,
                "times_faster": first / timing.median,
                "mfu": rate * flops / peak if peak else None,
                "peak_memory_bytes": timing.peak_memory,
            }
        print(_line(entry), file=table, flush=True)
        rungs.append(entry)
    found = limits(device, bf16=cannot(RUNGS[2], device) is None)
    fastest = max((rung["tokens_per_sec"] for rung in rungs if "ms" in rung), default=0.0)
    share = fastest * flops / found["matmul_flops"]
    print(
        f"limits: a large matmul {found['matmul_flops'] / 1e12:.3g} TFLOP/s, a large copy "
        f"{found['copy_bytes_per_sec'] / 1e9:.3g} GB/s; the fastest rung reaches {share:.0%} of that matmul",
        file=table,
    )
    return {"device": name, "shape": shape, "rungs": rungs, "limits": found | {"share_of_matmul": share}}
