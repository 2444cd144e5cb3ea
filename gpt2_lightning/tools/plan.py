"""``gpt2 plan``: what a recipe asks for, before anything runs: parameters, FLOPs, tokens, memory, time, cost.

Everything is arithmetic on the recipe; the memory is that of ``memory.py``.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gpt2_lightning.checkpoints.load import load
from gpt2_lightning.cli.launchers import check_strategy, check_trainer_settings
from gpt2_lightning.data.order import AUTO_ON_CPU, accumulation, micro_batch_sizes
from gpt2_lightning.data.shards import find_shards, list_shards, open_shard, read_manifest
from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPTConfig
from gpt2_lightning.schedule import BatchSizeSchedule, batch_size_stages, tokens_before
from gpt2_lightning.tools.gpus import GPU
from gpt2_lightning.tools.memory import (
    OPTIMIZERS,
    Step,
    count_parameters,
    flops_per_token,
    memory,
    recomputed_flops_per_token,
)

USABLE = 0.9
"""Share of a GPU's memory to plan with: the rest is left to CUDA, NCCL and what the allocator cannot use."""

FINEWEB_EDU_TOKENS = 10_000_000_000
"""Of its sample-10BT, as it is called."""

OPENAI_SHAPES = {
    "gpt2": GPTConfig(1024, 50257, 12, 12, 768),
    "gpt2-medium": GPTConfig(1024, 50257, 24, 16, 1024),
    "gpt2-large": GPTConfig(1024, 50257, 36, 20, 1280),
    "gpt2-xl": GPTConfig(1024, 50257, 48, 25, 1600),
}

PRECISIONS = {
    "32-true": (4, 4),
    "bf16-mixed": (4, 2),
    "16-mixed": (4, 2),
    "64-true": (8, 8),
}
"""``trainer.precision`` → bytes of a weight and of an activation. Others are refused."""

SHORT_PRECISIONS = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}


def plan(
    recipe: Any,
    gpu: GPU | None = None,
    gpus: int | None = None,
    mfu: float = 0.4,
    dollars_per_hour: float | None = None,
) -> dict[str, Any]:
    """The plan of a recipe, as LightningCLI's parser reads it, as one plain object.

    Args:
        recipe: its sections ``model``, ``data`` and ``trainer``.
        gpu: the kind of GPU; None leaves out what depends on it.
        gpus: how many; None takes ``trainer.devices`` · ``trainer.num_nodes``.
        mfu: the share of the GPUs' peak that the model's FLOPs are assumed to reach.
        dollars_per_hour: of one GPU.

    Raises:
        ValueError: a recipe that ``gpt2 fit`` would refuse too, or whose memory is not known.
    """
    data, trainer = recipe.data.get("init_args", recipe.data), recipe.trainer
    if "total_batch_tokens" not in data:
        raise UserError(
            "data is a class of your own, whose steps are not known: plan the recipe with the data settings"
        )
    check_trainer_settings(trainer)
    config = shape_of(recipe.model)
    check_strategy(_strategy(trainer.strategy)[0])
    devices = devices_of(trainer)
    world_size = gpus or devices
    step, notes = step_of(recipe, gpu, world_size)
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
    accumulated = accumulation(
        data.total_batch_tokens,
        size,
        config.block_size,
        world_size,
        trainer.accumulate_grad_batches,
        stages[0].step_tokens,
    )
    parts = memory(config, size, step)
    decayed, others = count_parameters(config)
    tokens = tokens_before(trainer.max_steps, stages)
    flops = flops_per_token(config)
    again = recomputed_flops_per_token(config) if step.activation_checkpointing else 0
    data_tokens, data_source = tokens_of(data.root, data.source)
    found: dict[str, Any] = {
        "shape": asdict(config),
        "parameters": {"all": decayed + others, "decayed": decayed, "not_decayed": others},
        "flops_per_token": flops,
        "recomputed_flops_per_token": again,
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
        "accumulate_grad_batches": accumulated,
        "step": asdict(replace(step, optimizer_args=None)),
        "memory_bytes": parts | {"sum": sum(parts.values())},
        "gpu": gpu and {"name": gpu.name, "memory_gb": gpu.memory_gb, "peak_flops": gpu.peak_flops},
        "fits": None if usable is None else sum(parts.values()) <= usable,
        "largest_micro_batch": fitting[-1] if fitting else None,
        "notes": notes,
    }
    if gpu and gpu.peak_flops:
        # the MFU is that of a step that computes nothing twice; what is computed twice takes its time on top
        seconds = (flops + again) * tokens / (mfu * gpu.peak_flops * world_size)
        found |= {"mfu": mfu, "seconds": seconds, "tokens_per_sec": tokens / seconds}
        if dollars_per_hour is not None:
            found |= {"dollars_per_hour": dollars_per_hour, "dollars": dollars_per_hour * world_size * seconds / 3600}
    return found


def shape_of(model: Any) -> GPTConfig:
    """The shape that ``model.config`` or, without it, ``model.init_from`` says."""
    if model.config is not None:
        return GPTConfig(**vars(model.config))
    if model.init_from is None:
        return GPTConfig()
    name = model.init_from.partition("@")[0]  # without the revision
    if name in OPENAI_SHAPES:
        return OPENAI_SHAPES[name]
    if not Path(model.init_from).exists():
        raise UserError(
            f"the shape of model.init_from={model.init_from} is not known: give a path, one of "
            f"{', '.join(OPENAI_SHAPES)}, or a model.config"
        )
    return load(model.init_from).config


def devices_of(trainer: Any) -> int:
    """How many devices a recipe trains on; ``auto`` and -1 are those of this machine."""
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = [number for number in devices.split(",") if number.strip()]
    if isinstance(devices, list):
        devices = len(devices)
    if devices in ("auto", "-1", -1):
        devices = 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    if not str(devices).isdecimal() or int(devices) < 1:
        raise UserError(f"trainer.devices is {trainer.devices}: give their number, or auto")
    if trainer.num_nodes < 1:
        raise UserError(f"trainer.num_nodes is {trainer.num_nodes}: give their number")
    return int(devices) * trainer.num_nodes


def step_of(recipe: Any, gpu: GPU | None, world_size: int) -> tuple[Step, list[str]]:
    """How the recipe's step is computed, and sentences on what of it is only assumed."""
    model, trainer = recipe.model, recipe.trainer
    precision = SHORT_PRECISIONS.get(str(trainer.precision), str(trainer.precision))
    if precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision is {precision}, whose memory is not known: give one of {', '.join(PRECISIONS)}"
        )
    weight_bytes, activation_bytes = PRECISIONS[precision]
    cpu = trainer.accelerator == "cpu" and gpu is None
    optimizer = model.optimizer.class_path.rpartition(".")[2]
    strategy, options = _strategy(trainer.strategy)
    sharded = "fullyshard" in strategy.lower().replace("_", "")
    notes = []
    if optimizer not in OPTIMIZERS:
        notes.append(f"the state of {optimizer} is not known: it is taken as AdamW's")
    if activation_bytes > 2 and gpu and gpu.peak_flops:
        notes.append("the peak is that of bf16: with TF32 the matmuls of fp32 reach half of it at most")
    if sharded and world_size > 1:
        notes.append(f"{strategy} is taken to share weights, gradients and optimizer among all devices")
    step = Step(
        weight_bytes,
        activation_bytes,
        optimizer,
        vars(model.optimizer.init_args),
        chunked_loss=cpu if model.chunked_loss == "auto" else model.chunked_loss,
        compiled=not cpu if model.compile == "auto" else model.compile,
        activation_checkpointing=model.activation_checkpointing,
        cpu=cpu,
        # `gpt2 fit` keeps the gradients in the buckets where the strategy is plain ddp
        ddp=world_size > 1 and not sharded and strategy != "ddp" and not options.get("gradient_as_bucket_view"),
        shards=world_size if sharded else 1,
    )
    return step, notes


def _strategy(strategy: Any) -> tuple[str, dict[str, Any]]:
    """Its name, and what it is given."""
    if isinstance(strategy, str):
        return strategy, {}
    options = vars(strategy.init_args) if "init_args" in strategy else {}
    return strategy.class_path.rpartition(".")[2], options | (strategy.get("dict_kwargs") or {})


def tokens_of(root: str, source: str | list[str] | None) -> tuple[int | None, str]:
    """The training tokens of a recipe's data and in words where they are; None where that is not known."""
    folder = Path(root)
    manifest = read_manifest(folder)
    if manifest is not None and manifest.complete:
        return manifest.tokens("train"), root
    if manifest is None and find_shards(folder):
        return sum(len(open_shard(path)) for path in list_shards(folder, "train")), root
    if isinstance(source, str) and source.partition("@")[0] == "fineweb-edu":
        return FINEWEB_EDU_TOKENS, "fineweb-edu, not prepared yet"
    return None, f"{root} is not prepared yet"


def describe(found: dict[str, Any]) -> str:
    """The plan as lines to read."""
    count, step, gpu = found["parameters"], found["step"], found["gpu"]
    devices = f"{found['devices']} device{'s' if found['devices'] > 1 else ''}" + (f" ({gpu['name']})" if gpu else "")
    shape = ", ".join(f"{name}={value}" for name, value in found["shape"].items())
    again = found["recomputed_flops_per_token"]
    epochs = (
        f"{found['epochs']:.2f} epochs of {found['data_tokens']:,} ({found['data']})"
        if found["epochs"]
        else f"epochs not known: {found['data']}"
    )
    ramp = found["first_tokens_per_step"]
    lines = [
        ("model", f"{count['all']:,} parameters ({count['decayed']:,} decayed, {count['not_decayed']:,} not): {shape}"),
        (
            "compute",
            f"{found['flops_per_token'] / 1e6:,.0f} MFLOP per token, {found['flops']:.3g} FLOP in all"
            + (f"; checkpointing computes {again / 1e6:,.0f} MFLOP per token twice" if again else ""),
        ),
        (
            "data",
            f"{found['tokens']:,} tokens in {found['steps']:,} steps of "
            + (f"{ramp:,} rising to " if ramp != found["tokens_per_step"] else "")
            + f"{found['tokens_per_step']:,}: {epochs}",
        ),
        (
            "step",
            f"{devices} × micro-batch of {found['micro_batch_size']} sequences × "
            f"{found['accumulate_grad_batches']} accumulated",
        ),
        ("memory", f"of each device, calculated for {_describe_step(step)}"),
    ]
    unit, name = (2**30, "GiB") if found["memory_bytes"]["sum"] >= 2**30 else (2**20, "MiB")
    text = [f"{head:<8} {line}" for head, line in lines]
    for part, size in found["memory_bytes"].items():
        label = f"optimizer ({step['optimizer']})" if part == "optimizer" else part
        text.append(f"{'':<8} {label:<22} {size / unit:9,.2f} {name}")
    if gpu:
        text.append(f"{'fits':<8} {_describe_fit(found, unit)}")
    if "seconds" in found:
        peak = f"{found['mfu']:.0%} of {gpu['peak_flops'] / 1e12:,.0f} TFLOP/s (dense bf16)"
        text.append(
            f"{'time':<8} {_describe_time(found['seconds'])} ({found['tokens_per_sec']:,.0f} tokens/s), assuming an "
            f"MFU of {peak}; evaluation is not in it"
        )
        if "dollars" in found:
            price = f"${found['dollars_per_hour']:,.2f} per GPU and hour"
            text.append(f"{'cost':<8} ${found['dollars']:,.2f} for that time, at {price}")
    else:
        text.append(f"{'time':<8} not known: give the kind of GPU, such as --gpu h100")
    return "\n".join(text + [f"{'note':<8} {note}" for note in found["notes"]])


def _describe_step(step: dict[str, Any]) -> str:
    kind = {(4, 4): "fp32", (4, 2): "16-bit autocast", (8, 8): "fp64"}
    return ", ".join(
        [
            kind[step["weight_bytes"], step["activation_bytes"]],
            "fused attention",
            "loss in chunks" if step["chunked_loss"] else "loss whole",
            "blocks checkpointed" if step["activation_checkpointing"] else "no checkpointing",
            "compiled" if step["compiled"] else "eager",
        ]
    )


def _describe_fit(found: dict[str, Any], unit: int) -> str:
    gpu, size, largest = found["gpu"], found["micro_batch_size"], found["largest_micro_batch"]
    room = f"{gpu['memory_gb']:g} GB, of which {1 - USABLE:.0%} are left to CUDA"
    if largest is None:
        mends = [
            "--model.chunked_loss true" if not found["step"]["chunked_loss"] else "",
            "--model.activation_checkpointing true" if not found["step"]["activation_checkpointing"] else "",
        ]
        return f"no micro-batch fits {room}: try {' '.join(m for m in mends if m) or 'a larger GPU'}"
    if not found["fits"]:
        return f"a micro-batch of {size} does not fit {room}: the largest that does, and divides the step, is {largest}"
    return f"yes, into {room}; the largest micro-batch that does, and divides the step, is {largest}"


def _describe_time(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"
