"""``gpt2 bench``: the video's speed ladder on this machine, with rungs of this package on top.

Each rung times the same training step on one micro-batch: forward, loss, backward, clipping, AdamW. A rung keeps the
changes of the rungs before it. The last rung runs the step in the Trainer, on shards, with the callbacks and loggers of
``gpt2 fit``.
"""

import contextlib
import gc
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2_lightning.callbacks.signals import stop_signal
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.data.shards import write_shard
from gpt2_lightning.hardware import is_out_of_memory, keep_compiled_code, keep_freed_memory, math_attention_is_faster
from gpt2_lightning.loss import LinearCrossEntropy, tokens_per_chunk
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.module import GPTModule
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
    devices: tuple[str, ...] = ("cpu", "cuda", "mps")
    """Device types on which ``gpt2 fit`` makes this change."""
    drops: str = ""
    """Name of an earlier rung whose change it takes back."""


RUNGS = (
    Rung("fp32", "fp32, attention as matmuls", 1000.0),
    Rung("tf32", "TF32 matmuls", 333.0, ("cuda",)),
    Rung("bf16", "bf16 autocast", 300.0, ("cpu", "cuda")),
    Rung("compile", "torch.compile", 130.0, ("cpu", "cuda")),
    Rung("flash", "fused attention", 96.0),
    Rung("vocab", "vocabulary 50257 → 50304", 93.0),
    Rung("fused", "fused AdamW", 90.0),
    Rung("larger", "4 × the micro-batch", devices=("cuda",)),  # 4 · 16 = 64, as in the recipes
    # a compiler cannot fuse the loop over chunks: on a CPU it is faster alone than together with torch.compile, and on
    # a GPU it saves memory, not time
    Rung("chunked", "chunked loss, eager", devices=("cpu",), drops="compile"),
    Rung("matmuls", "attention as matmuls again", devices=("cpu",), drops="flash"),
    Rung("memory", "freed memory kept", devices=("cpu",)),
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
    for rung, setup in ladder(partial(is_used, device=device, block_size=config.block_size)):
        if rung.name not in names:
            continue
        timing: dict[str, Any] = {"skipped": "not used on this device"}
        if setup is not None:
            timing = time_rung(setup, config, micro_batch_size, device, make_trainer)
        if "ms" in timing:
            rate = 1e3 * timing["micro_batch_size"] * config.block_size / timing["ms"]
            rates.append(rate)
            mfu = rate * flops / peak if peak else None
            timing |= {"tokens_per_sec": rate, "times_faster": rate / rates[0], "mfu": mfu}
        rungs.append({"name": rung.name, "title": rung.title, "a100_ms": rung.a100_ms} | timing)
        print(table_line(rungs[-1]), file=table, flush=True)
    found = limits(device, bf16=has_fast_bf16(device))
    found["share_of_matmul"] = max(rates, default=0.0) * flops / found["matmul_flops"]
    print(
        f"limits: a large matmul {found['matmul_flops'] / 1e12:.3g} TFLOP/s, a large copy "
        f"{found['copy_bytes_per_sec'] / 1e9:.3g} GB/s; the fastest rung reaches {found['share_of_matmul']:.0%} of the "
        "matmul",
        file=table,
    )
    return {"device": device_name, "shape": shape, "rungs": rungs, "limits": found}


def ladder(is_used: Callable[[Rung], bool]) -> Iterator[tuple[Rung, Setup | None]]:
    """Yields each rung and the setup to time. A rung that is not used has None and changes nothing."""
    kept = Setup()
    for rung in RUNGS:
        if is_used(rung):
            kept = kept - {rung.drops} | {rung.name}
            yield rung, kept
        else:
            yield rung, None


def is_used(rung: Rung, device: torch.device, block_size: int) -> bool:
    """Whether ``gpt2 bench`` times this rung on this device."""
    if device.type not in rung.devices:
        return False
    match rung.name:
        case "bf16":
            return has_fast_bf16(device)
        case "compile" if device.type == "cpu":
            return any(map(shutil.which, ("c++", "g++", "clang++")))
        case "matmuls":
            return math_attention_is_faster(device.type, has_fast_bf16(device), block_size)
    return True


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matmuls have bf16 instructions. A CPU without them loses more in casts than it gains."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def time_rung(
    setup: Setup, config: GPTConfig, micro_batch_size: int, device: torch.device, make_trainer: Callable[..., Trainer]
) -> dict[str, Any]:
    """Median in ms of a step, and on CUDA its peak memory in bytes."""
    config = replace(config, vocab_size=config.vocab_size if "vocab" in setup else VOCAB_SIZE)
    torch.set_float32_matmul_precision("high" if "tf32" in setup else "highest")
    if "compile" in setup:
        keep_compiled_code()
    if "memory" in setup:
        keep_freed_memory()
    size = 4 * micro_batch_size if "larger" in setup else micro_batch_size
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        if "trainer" in setup:
            seconds = time_trainer_steps(setup, config, size, device, make_trainer)
        else:
            seconds = time_plain_steps(setup, config, size, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"skipped": f"a micro-batch of {size} does not fit"}
    peak_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"micro_batch_size": size, "ms": 1e3 * median(seconds), "peak_memory_bytes": peak_memory}


def attention(setup: Setup) -> contextlib.AbstractContextManager[None]:
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

    loss_of = torch.compile(next_token_loss, dynamic=False) if "compile" in setup else next_token_loss
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


HEAD = (
    f"{'':28}{'ms':>9} {'tokens/s':>11} {'faster':>8} {'MFU':>6} {'memory':>9} {'micro-batch':>11} {'A100, video':>12}"
)


def table_line(rung: dict[str, Any]) -> str:
    if "skipped" in rung:
        return f"{rung['title']:28}skipped: {rung['skipped']}"
    mfu = f"{rung['mfu']:.1%}" if rung["mfu"] else "-"
    memory = f"{rung['peak_memory_bytes'] / 2**30:.2f} GiB" if rung["peak_memory_bytes"] else "-"
    video = f"{rung['a100_ms']:.0f} ms" if rung["a100_ms"] else "-"
    return (
        f"{rung['title']:28}{rung['ms']:9.1f} {rung['tokens_per_sec']:11,.0f} {rung['times_faster']:7.2f}x "
        f"{mfu:>6} {memory:>9} {rung['micro_batch_size']:11} {video:>12}"
    )
