"""GPUs by name: their memory, and the peak that a model FLOPs utilisation (MFU) is a share of."""

import re
from dataclasses import dataclass

import torch

from gpt2_lightning.errors import UserError


@dataclass(frozen=True)
class GPU:
    name: str
    """As typed after ``gpt2 plan --gpu``."""
    device_name: str
    """What torch calls it: a regular expression for the whole name."""
    memory_gb: float
    """As sold; 1 GB of a card is 2**30 bytes."""
    peak_flops: float | None
    """FLOP/s in bf16, without sparsity, sums in fp32; None where only the memory is known."""


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
"""From NVIDIA's data sheets, which print twice the figure where they count sparsity; the first that fits counts."""

SHORT_NAMES = {"a100": "a100-80"}


def find_gpu(name: str) -> GPU:
    """The GPU of this name, or one of which only the memory is known, from a size such as 24GB.

    Raises:
        ValueError: there is none, with those that there are.
    """
    typed = name.lower()
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?gi?b", typed):
        if float(size[1]) == 0:
            raise UserError(f"a GPU of {name} holds nothing: give its memory, such as 24GB")
        return GPU(name, "", float(size[1]), None)
    found = next((gpu for gpu in GPUS if gpu.name == SHORT_NAMES.get(typed, typed)), None)
    if found is None:
        raise UserError(
            f"no GPU {name!r} is known: choose from {', '.join(sorted([gpu.name for gpu in GPUS] + [*SHORT_NAMES]))}, "
            "or give its memory, such as 24GB"
        )
    return found


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu.peak_flops for gpu in GPUS if re.fullmatch(gpu.device_name, name)), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory: torch.OutOfMemoryError on CUDA, words alone on MPS and CPUs."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory"))
