"""GPUs by name: memory, and the peak FLOP/s that model FLOPs utilization (MFU) is relative to."""

import re
from dataclasses import dataclass

import torch

from gpt2_lightning.errors import UserError


@dataclass(frozen=True)
class GPU:
    name: str
    """As given to ``gpt2 plan --gpu``."""
    device_name: str
    """Regular expression for the whole of ``torch.cuda.get_device_name()``."""
    memory_gb: float
    """As sold; 1 GB of GPU memory is 2**30 bytes."""
    peak_flops: float | None
    """Dense bf16 FLOP/s with fp32 accumulation; None if only the memory is known."""


GPUS = (
    GPU("a100-80", "NVIDIA A100.*80GB.*", 80, 312e12),
    GPU("a100-40", "NVIDIA A100.*", 40, 312e12),
    GPU("h100-pcie", "NVIDIA H100 PCIe", 80, 756e12),
    GPU("h100-nvl", "NVIDIA H100 NVL", 94, 835e12),
    GPU("h100", "NVIDIA H100.*", 80, 989e12),
    GPU("h200", "NVIDIA H200", 141, 989e12),
    GPU("b200", "NVIDIA B200.*", 180, 2250e12),
    GPU("a10", "NVIDIA A10", 24, 125e12),
    GPU("l4", "NVIDIA L4", 24, 121e12),
    GPU("l40s", "NVIDIA L40S", 48, 362e12),
    GPU("a6000", "NVIDIA RTX A6000", 48, 154.8e12),
    GPU("3090", "NVIDIA GeForce RTX 3090", 24, 71e12),
    GPU("4090", "NVIDIA GeForce RTX 4090", 24, 165.2e12),
    GPU("5090", "NVIDIA GeForce RTX 5090", 32, 209.5e12),
)
"""From NVIDIA's data sheets, which print twice the figure where they count sparsity. The first match wins."""

SHORT_NAMES = {"a100": "a100-80"}


def find_gpu(name: str) -> GPU:
    """The GPU of this name, such as ``h100``, or one of this much memory, such as ``24GB``.

    Raises:
        UserError: the name is not known.
    """
    typed = name.lower()
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?gi?b", typed):
        return GPU(name, "", float(size[1]), None)
    for gpu in GPUS:
        if gpu.name == SHORT_NAMES.get(typed, typed):
            return gpu
    known = ", ".join(sorted([*SHORT_NAMES, *(gpu.name for gpu in GPUS)]))
    raise UserError(f"unknown GPU {name!r}: choose from {known}, or give the memory, such as 24GB")


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, or None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.peak_flops for gpu in GPUS if re.fullmatch(gpu.device_name, name)), None)
