"""What differs between devices: the attention kernel, running out of memory, caches of code and memory."""

import ctypes
import os
import sys
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h; their values are bytes


def math_attention_is_faster(device_type: str, bf16: bool, block_size: int) -> bool:
    """Whether attention by matmuls and a softmax beats the fused kernel: on a CPU, in bf16 on short sequences.

    There the fused kernel takes 3.0 ms, forward and backward, and the matmuls, which PyTorch runs in fp32, take 1.6
    (B=4, T=128, 4 heads of 16, two cores of an AMD EPYC). From T=256 on the fused one is as fast or faster.
    """
    return device_type == "cpu" and bf16 and block_size <= 128


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had too little memory. CUDA raises torch.OutOfMemoryError, MPS and CPUs only say so."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory"))


def keep_compiled_code() -> None:
    """Move torch.compile's cache from the temporary folder to the user's cache, where it survives a reboot.

    A ``TORCHINDUCTOR_CACHE_DIR`` of the user's own is respected. torch sets that variable itself, to its default, when
    it is imported; the default has no public name.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) != default_cache_dir():
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "gpt2_lightning" / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a read-only home, or none at all: torch's default stays
        return
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step, which needs the same blocks again.

    By default it returns large blocks to the kernel; mapping fresh pages then costs a small model on a CPU a tenth of
    its step. MALLOC_… or GLIBC_TUNABLES set by the user are respected. Does nothing on other systems.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc accepts; larger blocks are always mapped
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
