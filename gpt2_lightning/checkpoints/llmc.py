"""llm.c's checkpoint format, in and out (github.com/karpathy/llm.c: ``write_model`` of its train_gpt2.py).

Little-endian throughout. First 256 int32: magic, version (3: float32, 5: bfloat16), block_size, vocab_size, n_layer,
n_head, n_embd, rows of the embedding (vocab_size rounded up to 128), then zeros. Then the parameters without gaps, each
kind for all layers before the next kind, matrices as (out, in).
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tokenizer import VOCAB_SIZE

MAGIC = 20240326
MAGIC_BYTES = MAGIC.to_bytes(4, "little")
_HEADER_BYTES = 256 * 4
_VERSIONS = {torch.float32: 3, torch.bfloat16: 5}
_KINDS = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.c_attn.weight",
    "attn.c_attn.bias",
    "attn.c_proj.weight",
    "attn.c_proj.bias",
    "ln_2.weight",
    "ln_2.bias",
    "mlp.c_fc.weight",
    "mlp.c_fc.bias",
    "mlp.c_proj.weight",
    "mlp.c_proj.bias",
)


def _names(n_layer: int) -> list[str]:
    """Our names of the parameters in the file's order."""
    blocks = [f"transformer.h.{layer}.{kind}" for kind in _KINDS for layer in range(n_layer)]
    return [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        *blocks,
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ]


def write(model: GPT, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write ``model`` as llm.c's checkpoint, float32 or bfloat16, whole or not at all.

    The embedding's rows beyond the tokenizer's are replaced by llm.c's own padding, zeros.

    Raises:
        ValueError: at ``path`` there is something that is not an llm.c checkpoint, and would be lost.
    """
    if path.is_dir() or (path.exists() and path.open("rb").read(4) != MAGIC_BYTES):
        raise UserError(f"{path} exists and is not an llm.c checkpoint: name a new file, such as {path.stem}.llmc.bin")
    c = model.config
    vocab_size = min(c.vocab_size, VOCAB_SIZE)
    padded = -(-vocab_size // 128) * 128
    state = model.state_dict()
    wte = state["transformer.wte.weight"][:vocab_size]
    state["transformer.wte.weight"] = F.pad(wte, (0, 0, 0, padded - vocab_size))

    header = np.zeros(256, dtype="<i4")
    header[:8] = MAGIC, _VERSIONS[dtype], c.block_size, vocab_size, c.n_layer, c.n_head, c.n_embd, padded
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header.tobytes())
            for name in _names(c.n_layer):
                tensor = state[name].detach().cpu().to(dtype).contiguous()
                file.write(tensor.view(torch.uint8).numpy())  # numpy has no bfloat16
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Configuration and weights, under our names, of an llm.c checkpoint; the padding rows are left out.

    Raises:
        ValueError: an older version of the format, or a file that is damaged or cut short.
    """
    header = np.fromfile(path, dtype="<i4", count=256).tolist()
    if len(header) < 256:
        raise UserError(f"{path} is damaged: it ends inside the header of an llm.c checkpoint")
    _, version, block_size, vocab_size, n_layer, n_head, n_embd, padded = header[:8]
    dtype = next((dtype for dtype, number in _VERSIONS.items() if number == version), None)
    if dtype is None:
        raise UserError(
            f"{path} is an llm.c checkpoint of version {version}: only 3 (float32) and 5 (bfloat16) can be read"
        )
    parameters = (padded + block_size + 2) * n_embd + n_layer * (12 * n_embd + 13) * n_embd
    expected = _HEADER_BYTES + parameters * dtype.itemsize
    if min(header[2:8]) < 1 or padded < vocab_size or path.stat().st_size != expected:
        raise UserError(
            f"{path} is damaged or cut short: it has {path.stat().st_size} bytes, and its header asks for {expected}"
        )
    config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPT(config).named_parameters()}
    shapes["transformer.wte.weight"] = torch.Size((padded, n_embd))

    header_size = _HEADER_BYTES // dtype.itemsize
    flat = torch.from_file(str(path), size=header_size + parameters, dtype=dtype)[header_size:]  # memory-mapped
    names = _names(n_layer)
    pieces = flat.split([shapes[name].numel() for name in names])
    state = {name: piece.view(shapes[name]) for name, piece in zip(names, pieces, strict=True)}
    state["transformer.wte.weight"] = state["transformer.wte.weight"][:vocab_size]
    return config, state
