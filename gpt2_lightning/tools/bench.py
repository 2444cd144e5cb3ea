"""``gpt2 bench``: the video's speed ladder on this machine, with rungs of this package on top.

Each rung times the same training step on one micro-batch: forward, loss, backward, clipping, AdamW. A rung keeps the
changes of the rungs before it, except those of trial rungs. The last rung runs the step in the Trainer, on shards, with
the callbacks and loggers of ``gpt2 fit``.
"""

import contextlib
import gc
import io
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_lightning.callbacks.signals import stop_signal
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.data.shards import write_shard
from gpt2_lightning.loss import LinearCrossEntropy, tokens_per_chunk
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.module import (
    GPTModule,
    is_out_of_memory,
    keep_compiled_code,
    keep_freed_memory,
    math_attention_is_faster,
)
from gpt2_lightning.optim import AdamW, decay_groups
from gpt2_lightning.tokenizer import VOCAB_SIZE
from gpt2_lightning.tools.gpus import peak_flops
from gpt2_lightning.tools.memory import flops_per_token

WARMUP_STEPS, TIMED_STEPS = 3, 12


Setup = frozenset[str]
"""How a step is computed: the names of the rungs whose changes are in effect."""


@dataclass(frozen=True)
class Rung:
    name: str
    title: str
    a100_ms: float | None = None
    """The video's figure: one A100, 16 sequences of 1,024 tokens."""
    drops: str = ""
    """Name of an earlier rung whose change it takes back."""
    trial: bool = False
    """Not used by ``gpt2 fit``, so later rungs do not keep its change."""


RUNGS = (
    Rung("fp32", "fp32, attention as matmuls", 1000.0),
    Rung("tf32", "TF32 matmuls", 333.0),
    Rung("bf16", "bf16 autocast", 300.0),
    Rung("compile", "torch.compile", 130.0),
    Rung("flash", "fused attention", 96.0),
    Rung("vocab", "vocabulary 50257 → 50304", 93.0),
    Rung("fused", "fused AdamW", 90.0),
    Rung("larger", "4 × the micro-batch"),  # 4 · 16 = 64, as in the recipes
    # a compiler cannot fuse the loop over chunks: on a CPU it is faster alone than together with torch.compile
    Rung("chunked", "chunked loss, eager", drops="compile"),
    Rung("matmuls", "attention as matmuls again", drops="flash"),
    Rung("memory", "freed memory kept"),
    Rung("cudnn", "cuDNN attention (trial)", trial=True),
    Rung("autotune", "autotuned compile (trial)", trial=True),
    Rung("trainer", "the same in the Trainer"),
)


def default_shape(device: torch.device) -> tuple[GPTConfig, int]:
    """Config and micro-batch size: the video's 124M and 16 sequences, or the quickstart recipe's on a CPU."""
    if device.type == "cpu":
        return GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=64), 4
    return GPTConfig(), 16


def measure(
    config: GPTConfig,
    micro_batch_size: int,
    device: torch.device,
    names: list[str],
    table: TextIO,
    make_trainer: Callable[..., Trainer],
) -> dict[str, Any]:
    """Times the rungs of these names.

    Args:
        config: the model's shape.
        micro_batch_size: sequences per step.
        device: where to run.
        names: of the rungs to time. Rungs that are left out still count as changes for later ones.
        table: gets one line per rung as soon as it is timed.
        make_trainer: ``make_trainer(run_dir, callbacks, **trainer_settings)`` builds the Trainer of ``gpt2 fit`` with
            evaluation off. ``callbacks`` come after its own.

    Returns:
        Device, shape, rungs and limits as plain numbers and strings, ready for JSON.
    """
    flops = flops_per_token(config)
    peak = peak_flops(device)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    shape = asdict(config) | {"micro_batch_size": micro_batch_size}
    print(
        f"{device_name}: {', '.join(f'{name}={value}' for name, value in shape.items())}\n{HEAD}",
        file=table,
        flush=True,
    )
    rungs: list[dict[str, Any]] = []
    rates: list[float] = []  # tokens per second
    timing: dict[str, Any]
    for rung, setup, reason in ladder(partial(unavailable, device=device, block_size=config.block_size)):
        if rung.name not in names:
            continue
        timing = {"skipped": reason} if reason else time_rung(setup, config, micro_batch_size, device, make_trainer)
        if "ms" in timing:
            rate = 1e3 * timing["micro_batch_size"] * config.block_size / timing["ms"]
            rates.append(rate)
            mfu = rate * flops / peak if peak else None
            timing |= {"tokens_per_sec": rate, "times_faster": rate / rates[0], "mfu": mfu}
        rungs.append({"name": rung.name, "title": rung.title, "a100_ms": rung.a100_ms} | timing)
        print(table_line(rungs[-1], micro_batch_size), file=table, flush=True)
    found = limits(device, bf16=has_fast_bf16(device))
    found["share_of_matmul"] = max(rates, default=0.0) * flops / found["matmul_flops"]
    print(
        f"limits: a large matmul {found['matmul_flops'] / 1e12:.3g} TFLOP/s, a large copy "
        f"{found['copy_bytes_per_sec'] / 1e9:.3g} GB/s; the fastest rung reaches {found['share_of_matmul']:.0%} of the "
        "matmul",
        file=table,
    )
    return {"device": device_name, "shape": shape, "rungs": rungs, "limits": found}


def ladder(unavailable: Callable[[Rung], str | None]) -> Iterator[tuple[Rung, Setup, str | None]]:
    """Yields each rung, the setup to time, and the reason if it is unavailable. Such a rung changes nothing."""
    kept = Setup()
    for rung in RUNGS:
        reason = unavailable(rung)
        setup = kept if reason else kept - {rung.drops} | {rung.name}
        if not rung.trial:
            kept = setup
        yield rung, setup, reason


def unavailable(rung: Rung, device: torch.device, block_size: int) -> str | None:
    """Why this device skips a rung, or None."""
    cuda, cpu = device.type == "cuda", device.type == "cpu"
    match rung.name:
        case "tf32" if not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
            return "no TF32 on this device"
        case "bf16" if not has_fast_bf16(device):
            return "no fast bf16 on this device"
        case "compile" | "autotune" if device.type == "mps" or sys.platform == "win32":
            return "not worth using here"
        case "compile" if cpu and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "no C++ compiler"
        case "larger" if not cuda:
            return "no faster here"
        case "chunked" if not cpu:
            return "saves memory, not time, on a GPU: model.chunked_loss"
        case "matmuls" if not math_attention_is_faster(device.type, has_fast_bf16(device), block_size):
            return "fused attention is faster here"
        case "memory" if not (cpu and sys.platform == "linux"):
            return "glibc only"
        case "cudnn" if not (cuda and has_fast_bf16(device) and _has_cudnn_attention(device)):
            return "no cuDNN attention on this device"
        case "autotune" if cpu:
            return "the step is not compiled here"
    return None


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matmuls have bf16 instructions. A CPU without them loses more in casts than it gains."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _has_cudnn_attention(device: torch.device) -> bool:
    q = torch.zeros(1, 1, 128, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    except RuntimeError:
        return False
    return True


def time_rung(
    setup: Setup, config: GPTConfig, micro_batch_size: int, device: torch.device, make_trainer: Callable[..., Trainer]
) -> dict[str, Any]:
    """Median and quartiles in ms and the peak memory in bytes. Halves the micro-batch until it fits."""
    config = replace(config, vocab_size=config.vocab_size if "vocab" in setup else VOCAB_SIZE)
    torch.set_float32_matmul_precision("high" if "tf32" in setup else "highest")
    if "compile" in setup:
        keep_compiled_code()
    if "memory" in setup:
        keep_freed_memory()
    time_steps: Callable[..., list[float]] = time_plain_steps
    if "trainer" in setup:
        time_steps = partial(time_trainer_steps, make_trainer=make_trainer)
    size = 4 * micro_batch_size if "larger" in setup else micro_batch_size
    while size >= 1:
        torch.compiler.reset()
        gc.collect()
        _reset_memory(device)
        try:
            seconds = time_steps(setup, config, size, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size //= 2  # the next try comes after this handler, whose traceback holds the activations
        else:
            low, median, high = (1e3 * float(ms) for ms in np.quantile(seconds, (0.25, 0.5, 0.75)))
            peak = _peak_memory(device)
            return {"micro_batch_size": size, "ms": median, "ms_low": low, "ms_high": high, "peak_memory_bytes": peak}
    return {"skipped": "does not fit"}


def attention(setup: Setup) -> contextlib.AbstractContextManager[None]:
    if "cudnn" in setup:
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    return contextlib.nullcontext() if "flash" in setup else sdpa_kernel(SDPBackend.MATH)


def time_plain_steps(setup: Setup, config: GPTConfig, micro_batch_size: int, device: torch.device) -> list[float]:
    """Seconds of each step in a plain loop."""
    torch.manual_seed(0)
    model = GPT(config).to(device)
    make_optimizer: Any = AdamW if "fused" in setup else torch.optim.AdamW
    groups = decay_groups(model.named_parameters())
    optimizer = make_optimizer(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    criterion = LinearCrossEntropy(tokens_per_chunk(config.vocab_size) if "chunked" in setup else None)

    def next_token_loss(ids: Tensor) -> Tensor:
        hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
        return criterion(hidden, model.lm_head.weight, ids[:, 1:].flatten())

    options: Any = {"max_autotune": True, "coordinate_descent_tuning": True} if "autotune" in setup else None
    loss_of = torch.compile(next_token_loss, dynamic=False, options=options) if "compile" in setup else next_token_loss
    seconds = []
    with attention(setup):
        for _ in range(WARMUP_STEPS + TIMED_STEPS):
            ids = torch.randint(0, VOCAB_SIZE, (micro_batch_size, config.block_size + 1)).to(device)
            _synchronize(device)
            started = time.perf_counter()
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled="bf16" in setup):
                loss = loss_of(ids)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()  # as a loop that logs does
            _synchronize(device)
            seconds.append(time.perf_counter() - started)
    return seconds[WARMUP_STEPS:]


class StepTimes(Callback):
    """When each step ended. StepMetrics, which comes before it, has waited for the device."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ends.append(time.perf_counter())


def time_trainer_steps(
    setup: Setup, config: GPTConfig, micro_batch_size: int, device: torch.device, make_trainer: Callable[..., Trainer]
) -> list[float]:
    """Seconds of each step of a run that logs every step."""
    times = StepTimes()
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 2_000_000, dtype=np.uint16)
    with tempfile.TemporaryDirectory() as name:
        run_dir = Path(name)
        write_shard(run_dir / "random_val_000000.npy", tokens[: 10 * config.block_size])
        write_shard(run_dir / "random_train_000001.npy", tokens)
        data = TokenDataModule(
            root=name,
            source=None,
            total_batch_tokens=micro_batch_size * config.block_size,
            micro_batch_size=micro_batch_size,
            num_workers=2 if device.type == "cuda" else 0,  # as in the recipes
        )
        trainer = make_trainer(
            run_dir,
            [times],
            accelerator=device.type,
            devices=1,
            precision="bf16-mixed" if "bf16" in setup else "32-true",
            max_steps=WARMUP_STEPS + TIMED_STEPS,
        )
        # the progress bar belongs to the step, but not into the table
        hidden = io.StringIO()
        with attention(setup), contextlib.redirect_stderr(hidden), contextlib.redirect_stdout(hidden):
            trainer.fit(GPTModule(config, compile="compile" in setup, chunked_loss="chunked" in setup), data)
    if stop_signal(trainer):
        raise KeyboardInterrupt
    return np.diff(times.ends)[WARMUP_STEPS - 1 :].tolist()


def limits(device: torch.device, bf16: bool) -> dict[str, float]:
    """What the machine reaches with nothing else running: FLOP/s of a large matmul, bytes/s of a large copy."""
    large = device.type == "cuda"
    n, megabytes = (8192, 1024) if large else (2048, 256)
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return {
        "matmul_flops": 2 * n**3 / _best_seconds(lambda: a @ a, device),
        "copy_bytes_per_sec": 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device),
    }


def _best_seconds(run: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(10):
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reset_memory(device: torch.device) -> None:
    """Frees cached memory and restarts the measurement of the peak."""
    if device.type == "cpu" and sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    elif device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "cpu" and sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return None


HEAD = f"{'':28}{'ms':>9} {'quartiles':>17} {'tokens/s':>11} {'faster':>8} {'MFU':>6} {'memory':>9} {'A100, video':>12}"


def table_line(rung: dict[str, Any], micro_batch_size: int) -> str:
    if "skipped" in rung:
        return f"{rung['title']:28}skipped: {rung['skipped']}"
    mfu = f"{rung['mfu']:.1%}" if rung["mfu"] else "-"
    memory = f"{rung['peak_memory_bytes'] / 2**30:.2f} GiB" if rung["peak_memory_bytes"] else "-"
    video = f"{rung['a100_ms']:.0f} ms" if rung["a100_ms"] else "-"
    quartiles = f"{rung['ms_low']:8.1f}-{rung['ms_high']:<8.1f}"
    size = rung["micro_batch_size"]
    other_size = "" if size == micro_batch_size else f"  micro-batch {size}"
    return (
        f"{rung['title']:28}{rung['ms']:9.1f} {quartiles} {rung['tokens_per_sec']:11,.0f} "
        f"{rung['times_faster']:7.2f}x {mfu:>6} {memory:>9} {video:>12}{other_size}"
    )
