"""llm.c's checkpoint format (github.com/karpathy/llm.c: ``write_model`` of its train_gpt2.py).

Little-endian. A header of 256 int32: magic, version (3: float32, 5: bfloat16), block_size, vocab_size, n_layer, n_head,
n_embd, rows of the embedding (vocab_size rounded up to a multiple of 128), then zeros. Then the parameters without
gaps, each kind for all layers before the next kind, matrices as (out, in).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_lightning.errors import UserError
from gpt2_lightning.files import atomic_file
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tokenizer import VOCAB_SIZE

MAGIC = 20240326
MAGIC_BYTES = MAGIC.to_bytes(4, "little")
_HEADER_BYTES = 256 * 4
_VERSIONS = {torch.float32: 3, torch.bfloat16: 5}
_DTYPES = {version: dtype for dtype, version in _VERSIONS.items()}
_MODULES = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def _names(n_layer: int) -> list[str]:
    """Our parameter names in the file's order."""
    kinds = [f"{module}.{kind}" for module in _MODULES for kind in ("weight", "bias")]
    blocks = [f"transformer.h.{layer}.{kind}" for kind in kinds for layer in range(n_layer)]
    ends = ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    return ["transformer.wte.weight", "transformer.wpe.weight", *blocks, *ends]


def write(model: GPT, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes ``model`` as llm.c's checkpoint, in float32 or bfloat16. The file appears complete or not at all.

    Embedding rows beyond the tokenizer's are replaced by llm.c's own padding, which is zeros.

    Raises:
        UserError: ``path`` exists and is not an llm.c checkpoint.
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
    with atomic_file(path) as file:
        file.write(header.tobytes())
        for name in _names(c.n_layer):
            tensor = state[name].detach().cpu().to(dtype).contiguous()
            file.write(tensor.view(torch.uint8).numpy())  # numpy has no bfloat16


def read(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and memory-mapped weights of an llm.c checkpoint, by our names and without the padding rows.

    Raises:
        UserError: the format is an older version, or the file is damaged or truncated.
    """
    header = np.fromfile(path, dtype="<i4", count=256).tolist()
    if len(header) < 256:
        raise UserError(f"{path} is truncated: it ends inside the header of an llm.c checkpoint")
    _, version, block_size, vocab_size, n_layer, n_head, n_embd, padded = header[:8]
    if version not in _DTYPES:
        raise UserError(f"{path} is an llm.c checkpoint of version {version}: versions 3 and 5 can be read")
    dtype = _DTYPES[version]
    parameters = (padded + block_size + 2) * n_embd + n_layer * (12 * n_embd + 13) * n_embd
    expected = _HEADER_BYTES + parameters * dtype.itemsize
    if path.stat().st_size != expected:
        raise UserError(
            f"{path} is damaged or truncated: it has {path.stat().st_size} bytes, and its header says {expected}"
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
