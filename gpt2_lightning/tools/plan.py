"""``gpt2 plan``: parameters, FLOPs, tokens, memory, time and cost of a recipe, by arithmetic alone."""

from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from gpt2_lightning.checkpoints.load import load
from gpt2_lightning.data.order import AUTO_ON_CPU, accumulation, micro_batch_sizes
from gpt2_lightning.data.shards import find_shards, list_shards, open_shard, read_manifest
from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPTConfig
from gpt2_lightning.schedule import BatchSizeSchedule, batch_size_stages, tokens_before
from gpt2_lightning.tools.gpus import GPU
from gpt2_lightning.tools.memory import (
    OPTIMIZERS,
    StepSetup,
    count_parameters,
    flops_per_token,
    memory,
    recomputed_flops_per_token,
)

USABLE = 0.9
"""Share of a GPU's memory to plan with. The rest goes to CUDA, NCCL and fragmentation."""

FINEWEB_EDU_TOKENS = 10_000_000_000
"""Nominal size of its sample-10BT."""

OPENAI_CONFIGS = {
    "gpt2": GPTConfig(1024, 50257, 12, 12, 768),
    "gpt2-medium": GPTConfig(1024, 50257, 24, 16, 1024),
    "gpt2-large": GPTConfig(1024, 50257, 36, 20, 1280),
    "gpt2-xl": GPTConfig(1024, 50257, 48, 25, 1600),
}

ACTIVATION_BYTES = {"32-true": 4, "bf16-mixed": 2, "16-mixed": 2}
"""By ``trainer.precision``. Weights take 4 bytes in all of them."""


def plan(
    recipe: Any,
    gpu: GPU | None = None,
    gpus: int | None = None,
    mfu: float = 0.4,
    dollars_per_hour: float | None = None,
) -> dict[str, Any]:
    """Plans a run.

    Args:
        recipe: the parsed recipe, with its sections ``model``, ``data`` and ``trainer``.
        gpu: the kind of GPU; None leaves out what depends on it.
        gpus: how many over all nodes; None takes ``trainer.devices`` · ``trainer.num_nodes``.
        mfu: assumed model FLOPs utilization, a share of the GPUs' peak.
        dollars_per_hour: price of one GPU.

    Returns:
        Plain numbers and strings, ready for JSON. Memory is in bytes per device, time in seconds.

    Raises:
        UserError: the step does not divide, or the recipe leaves open something that the plan depends on.
    """
    data, trainer = recipe.data.get("init_args", recipe.data), recipe.trainer
    if "total_batch_tokens" not in data:
        raise UserError("cannot plan a run with a data class of your own: give the data settings of TokenDataModule")
    config = _config_of(recipe.model)
    world_size = gpus or _devices_of(trainer)
    step, notes = _step_of(recipe, gpu, world_size)
    schedule = data.batch_size_schedule and BatchSizeSchedule(**vars(data.batch_size_schedule))
    stages = batch_size_stages(data.total_batch_tokens, schedule)

    sizes = micro_batch_sizes(data.total_batch_tokens, config.block_size, world_size, stages[0].step_tokens)
    usable = USABLE * 2**30 * gpu.memory_gb if gpu else None
    fitting = [b for b in sizes if usable and sum(memory(config, b, step).values()) <= usable]
    size = data.micro_batch_size
    if size == "auto" and step.cpu:
        size = max(b for b in sizes if b <= max(AUTO_ON_CPU, sizes[0]))
    elif size == "auto" and gpu is None:
        raise UserError("data.micro_batch_size is auto, which depends on the GPU: give --gpu or --micro_batch_size")
    elif size == "auto":
        size = (fitting or sizes[:1])[-1]
    accumulate_grad_batches = accumulation(
        data.total_batch_tokens, size, config.block_size, world_size, start_tokens=stages[0].step_tokens
    )
    parts = memory(config, size, step)
    decayed, not_decayed = count_parameters(config)
    tokens = tokens_before(trainer.max_steps, stages)
    flops = flops_per_token(config)
    recomputed = recomputed_flops_per_token(config) if step.activation_checkpointing else 0
    data_tokens, data_source = _tokens_of(Path(data.root), data.source)
    found: dict[str, Any] = {
        "shape": asdict(config),
        "parameters": {"all": decayed + not_decayed, "decayed": decayed, "not_decayed": not_decayed},
        "flops_per_token": flops,
        "recomputed_flops_per_token": recomputed,
        "flops": flops * tokens,
        "steps": trainer.max_steps,
        "tokens_per_step": data.total_batch_tokens,
        "first_tokens_per_step": stages[0].step_tokens,
        "tokens": tokens,
        "data_tokens": data_tokens,
        "data": data_source,
        "epochs": tokens / data_tokens if data_tokens else None,
        "devices": world_size,
        "micro_batch_size": size,
        "accumulate_grad_batches": accumulate_grad_batches,
        "step": asdict(replace(step, optimizer_args=None)),
        "memory_bytes": parts | {"sum": sum(parts.values())},
        "gpu": gpu and {"name": gpu.name, "memory_gb": gpu.memory_gb, "peak_flops": gpu.peak_flops},
        "fits": None if usable is None else sum(parts.values()) <= usable,
        "largest_micro_batch": fitting[-1] if fitting else None,
        "notes": notes,
    }
    if gpu and gpu.peak_flops:
        # MFU does not count recomputed FLOPs, but they take time
        seconds = (flops + recomputed) * tokens / (mfu * gpu.peak_flops * world_size)
        found |= {"mfu": mfu, "seconds": seconds, "tokens_per_sec": tokens / seconds}
        if dollars_per_hour is not None:
            found |= {"dollars_per_hour": dollars_per_hour, "dollars": dollars_per_hour * world_size * seconds / 3600}
    return found


def _config_of(model: Any) -> GPTConfig:
    if model.config is not None:
        return GPTConfig(**vars(model.config))
    if model.init_from is None:
        return GPTConfig()
    name = model.init_from.partition("@")[0]  # without the revision
    return OPENAI_CONFIGS[name] if name in OPENAI_CONFIGS else load(model.init_from).config


def _devices_of(trainer: Any) -> int:
    """Devices over all nodes. ``auto`` and -1 mean those of this machine."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(",").split(",")
    if isinstance(devices, list):
        devices = len(devices)
    if str(devices) in ("auto", "-1"):
        devices = 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    return int(devices) * trainer.num_nodes


def _step_of(recipe: Any, gpu: GPU | None, world_size: int) -> tuple[StepSetup, list[str]]:
    """How the step is computed, and notes on what is assumed."""
    model, trainer = recipe.model, recipe.trainer
    short = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    precision = short.get(str(trainer.precision), str(trainer.precision))
    if precision not in ACTIVATION_BYTES:
        raise UserError(f"cannot plan with trainer.precision {precision}: give one of {', '.join(ACTIVATION_BYTES)}")
    activation_bytes = ACTIVATION_BYTES[precision]
    cpu = trainer.accelerator == "cpu" and gpu is None
    optimizer = model.optimizer.class_path.rpartition(".")[2]
    strategy = trainer.strategy
    strategy_args: dict[str, Any] = {}
    if not isinstance(strategy, str):  # class_path and init_args
        strategy_args = vars(strategy.init_args) if "init_args" in strategy else {}
        strategy = strategy.class_path.rpartition(".")[2]
    sharded = "fullyshard" in strategy.lower().replace("_", "")
    notes = []
    if optimizer not in OPTIMIZERS:
        notes.append(f"the state size of {optimizer} is unknown: assuming as much as AdamW's")
    if activation_bytes > 2 and gpu and gpu.peak_flops:
        notes.append("the peak is that of bf16: fp32 matmuls reach at most half of it, with TF32")
    if sharded and world_size > 1:
        notes.append(f"assuming that {strategy} shards weights, gradients and optimizer state over all devices")
    step = StepSetup(
        activation_bytes=activation_bytes,
        optimizer=optimizer,
        optimizer_args=vars(model.optimizer.init_args),
        chunked_loss=cpu if model.chunked_loss == "auto" else model.chunked_loss,
        compiled=not cpu if model.compile == "auto" else model.compile,
        activation_checkpointing=model.activation_checkpointing,
        cpu=cpu,
        # with the plain name ddp, `gpt2 fit` sets gradient_as_bucket_view: one copy of the gradients
        ddp=world_size > 1 and not sharded and strategy != "ddp" and not strategy_args.get("gradient_as_bucket_view"),
        shards=world_size if sharded else 1,
    )
    return step, notes


def _tokens_of(root: Path, source: str | list[str] | None) -> tuple[int | None, str]:
    """The number of training tokens, None if unknown, and where they are."""
    manifest = read_manifest(root)
    if manifest is not None and manifest.complete:
        return manifest.tokens("train"), str(root)
    if manifest is None and find_shards(root):
        return sum(len(open_shard(path)) for path in list_shards(root, "train")), str(root)
    if isinstance(source, str) and source.partition("@")[0] == "fineweb-edu":
        return FINEWEB_EDU_TOKENS, "fineweb-edu, not prepared yet"
    return None, f"{root} is not prepared yet"


def describe(found: dict[str, Any]) -> str:
    """The plan as text."""
    count, step, gpu = found["parameters"], found["step"], found["gpu"]
    shape = ", ".join(f"{name}={value}" for name, value in found["shape"].items())
    compute = f"{found['flops_per_token'] / 1e6:,.0f} MFLOP per token, {found['flops']:.3g} FLOP in total"
    if found["recomputed_flops_per_token"]:
        compute += f"; checkpointing adds {found['recomputed_flops_per_token'] / 1e6:,.0f} MFLOP per token"
    step_tokens = f"{found['tokens_per_step']:,}"
    if found["first_tokens_per_step"] != found["tokens_per_step"]:
        step_tokens = f"{found['first_tokens_per_step']:,} rising to {step_tokens}"
    epochs = f"unknown number of epochs: {found['data']}"
    if found["epochs"]:
        epochs = f"{found['epochs']:.2f} epochs of {found['data_tokens']:,} ({found['data']})"
    devices = f"{found['devices']} device{'s' if found['devices'] > 1 else ''}" + (f" ({gpu['name']})" if gpu else "")
    kinds = [
        "fp32" if step["activation_bytes"] == 4 else "16-bit autocast",
        "fused attention",
        "chunked loss" if step["chunked_loss"] else "whole logits",
        "activation checkpointing" if step["activation_checkpointing"] else "no checkpointing",
        "compiled" if step["compiled"] else "eager",
    ]
    lines = [
        ("model", f"{count['all']:,} parameters ({count['decayed']:,} decayed, {count['not_decayed']:,} not): {shape}"),
        ("compute", compute),
        ("data", f"{found['tokens']:,} tokens in {found['steps']:,} steps of {step_tokens}: {epochs}"),
        (
            "step",
            f"{devices} × micro-batch of {found['micro_batch_size']} sequences × "
            f"{found['accumulate_grad_batches']} accumulated",
        ),
        ("memory", f"per device, calculated for {', '.join(kinds)}"),
    ]
    unit, unit_name = (2**30, "GiB") if found["memory_bytes"]["sum"] >= 2**30 else (2**20, "MiB")
    for part, size in found["memory_bytes"].items():
        label = f"optimizer ({step['optimizer']})" if part == "optimizer" else part
        lines.append(("", f"{label:<22} {size / unit:9,.2f} {unit_name}"))
    if gpu:
        lines.append(("fits", _describe_fit(found)))
    if "seconds" in found:
        duration = timedelta(seconds=round(found["seconds"]))
        peak = f"{found['mfu']:.0%} of {gpu['peak_flops'] / 1e12:,.0f} TFLOP/s (dense bf16)"
        rate = f"{found['tokens_per_sec']:,.0f} tokens/s"
        lines.append(("time", f"{duration} ({rate}) without evaluation, assuming an MFU of {peak}"))
    else:
        lines.append(("time", "unknown: give the kind of GPU, such as --gpu h100"))
    if "dollars" in found:
        lines.append(("cost", f"${found['dollars']:,.2f} at ${found['dollars_per_hour']:,.2f} per GPU hour"))
    lines += [("note", note) for note in found["notes"]]
    return "\n".join(f"{head:<8} {line}" for head, line in lines)


def _describe_fit(found: dict[str, Any]) -> str:
    step, size, largest = found["step"], found["micro_batch_size"], found["largest_micro_batch"]
    room = f"{found['gpu']['memory_gb']:g} GB, of which {1 - USABLE:.0%} is reserved for CUDA"
    if largest is None:
        savers = [f"--model.{name} true" for name in ("chunked_loss", "activation_checkpointing") if not step[name]]
        return f"no micro-batch fits in {room}: try {' '.join(savers) or 'a larger GPU'}"
    answer = "yes" if found["fits"] else f"no, a micro-batch of {size} does not fit"
    return f"{answer}, in {room}; the largest micro-batch that fits and divides the step is {largest}"
