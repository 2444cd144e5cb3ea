"""``gpt2 bench`` as a table for whoever watches, and as one plain object for scripts."""

from dataclasses import asdict
from typing import Any, TextIO

import torch

from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tools.bench import RUNGS, cannot, climb, limits
from gpt2_lightning.tools.gpus import peak_flops

HEAD = f"{'':28}{'ms':>9} {'quartiles':>17} {'tokens/s':>11} {'faster':>8} {'MFU':>6} {'memory':>9} {'A100, video':>12}"


def _line(rung: dict[str, Any], micro_batch_size: int) -> str:
    if "skipped" in rung:
        return f"{rung['title']:28}{'skipped: ' + rung['skipped']}"
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


def measure(
    config: GPTConfig, micro_batch_size: int, device: torch.device, names: list[str], table: TextIO
) -> dict[str, Any]:
    """The ladder and the limits as one plain object, and as a ``table`` that grows while it climbs."""
    with torch.device("meta"):
        flops = GPT(config).flops_per_token()
    rungs: list[dict[str, Any]] = []
    first_rate = None
    shape = asdict(config) | {"micro_batch_size": micro_batch_size}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}: {', '.join(f'{key}={value}' for key, value in shape.items())}\n{HEAD}", file=table, flush=True)
    for rung, timing in climb(config, micro_batch_size, device, names):
        entry: dict[str, Any] = {"name": rung.name, "title": rung.title, "a100_ms": rung.a100_ms}
        if isinstance(timing, str):
            entry["skipped"] = timing
        else:
            rate, peak = timing.micro_batch_size * config.block_size / timing.median, peak_flops(device)
            first_rate = first_rate or rate
            entry |= {
                "micro_batch_size": timing.micro_batch_size,
                "ms": 1e3 * timing.median,
                "ms_low": 1e3 * timing.low,
                "ms_high": 1e3 * timing.high,
                "tokens_per_sec": rate,
                "times_faster": rate / first_rate,  # per token: micro-batches may differ
                "mfu": rate * flops / peak if peak else None,
                "peak_memory_bytes": timing.peak_memory,
            }
        print(_line(entry, micro_batch_size), file=table, flush=True)
        rungs.append(entry)
    found = limits(device, bf16=cannot(RUNGS[2], device, config.block_size) is None)
    fastest = max((rung["tokens_per_sec"] for rung in rungs if "ms" in rung), default=0.0)
    share = fastest * flops / found["matmul_flops"]
    print(
        f"limits: a large matmul {found['matmul_flops'] / 1e12:.3g} TFLOP/s, a large copy "
        f"{found['copy_bytes_per_sec'] / 1e9:.3g} GB/s; the fastest rung reaches {share:.0%} of that matmul",
        file=table,
    )
    return {"device": name, "shape": shape, "rungs": rungs, "limits": found | {"share_of_matmul": share}}
