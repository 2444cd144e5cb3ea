"""Hugging Face's GPT-2 format: the key maps both ways, and reading, from a folder or the hub."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpt2_lightning.checkpoints.ours import torch_load
from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPTConfig

# Conv1D in HF, which stores (in, out); nn.Linear stores (out, in)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# what our network is, as config.json spells it; an absent key has the first value. A GPT-2 with another is not ours
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
# the shape of a config.json that does not tell it: GPT-2 (124M)
_DEFAULT_SHAPE = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
# the files that may hold the weights, in the order of preference
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """HF's names and orientation → ours. With or without the ``transformer.`` prefix; mask buffers left out.

    The values are views; the head is left out where it equals the embedding, to which it is tied.
    """
    named = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    head = named.get("lm_head.weight")
    if head is not None and "wte.weight" in named and torch.equal(head, named["wte.weight"]):
        del named["lm_head.weight"]
    return {
        name if name.startswith("lm_head") else f"transformer.{name}": t.t() if name.endswith(_TRANSPOSED) else t
        for name, t in named.items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))
    }


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names and orientation → ``GPT2LMHeadModel``'s, without the tied head: the inverse of ``from_hf``."""
    return {
        name: (t.t() if name.endswith(_TRANSPOSED) else t).contiguous()
        for name, t in state.items()
        if name != "lm_head.weight"
    }


def read_folder(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Configuration and weights, under our names, of a folder as ``save_pretrained`` writes it.

    Raises:
        ValueError: no ``config.json``, another architecture, no weights, a missing or damaged file.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json, so it is no model folder: give that, or a checkpoint file")
    return _read_config(folder / "config.json"), from_hf(_read_weights(folder))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; a ``ValueError`` where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): it is damaged") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: it is damaged")
    return content


def _read_config(path: Path) -> GPTConfig:
    config = read_json(path)
    if config.get("model_type") != "gpt2":
        raise UserError(f"{path} describes the architecture {config.get('model_type')!r}: only 'gpt2' can be loaded")
    for key, allowed in _FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path} has {key} = {config[key]!r}: GPT-2 as published has {allowed[0]!r}")
    shape = {key: config.get(key, default) for key, default in _DEFAULT_SHAPE.items()}
    if wrong := [f"{key} = {value!r}" for key, value in shape.items() if type(value) is not int]:
        raise UserError(f"{path} has {', '.join(wrong)}, where a whole number belongs: it is damaged")
    if config.get("n_inner") not in (None, 4 * shape["n_embd"]):
        raise UserError(
            f"{path} has n_inner = {config['n_inner']!r}: GPT-2 as published has 4 · n_embd = {4 * shape['n_embd']}"
        )
    return GPTConfig(block_size=shape.pop("n_positions"), **shape)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    name = next((name for name in _WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise UserError(
            f"{folder} holds no weights: expected {_WEIGHT_FILES[0]}, {_WEIGHT_FILES[2]} or an index of shards"
        )
    if not name.endswith(".index.json"):
        return _read_weight_file(folder / name)
    index = read_json(folder / name)
    if not isinstance(index.get("weight_map"), dict):
        raise UserError(f"{folder / name} has no weight_map: it is damaged")
    shards = index["weight_map"].values()
    for shard in shards:  # a name with a separator in it could lead out of the folder
        if not isinstance(shard, str) or not re.fullmatch(r"\w[\w.-]*", shard):
            raise UserError(f"{folder / name} lists {shard!r}, which is no file's name: it is damaged")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(shards)):
        if not (folder / shard).is_file():
            raise UserError(f"{folder / shard} is missing, although {name} lists it: fetch the model again")
        state |= _read_weight_file(folder / shard)
    return state


def _read_weight_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or cut short ({error}): fetch or export it again") from None
    state = torch_load(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is a torch file, but not one of weights by name")
    return state


def download(name: str, revision: str | None) -> Path:
    """Folder of the hub's model ``name`` in the local cache, fetched where it is missing.

    Raises:
        ValueError: there is no such model, or no connection to the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["config.json", "model*.safetensors", "model.safetensors.index.json"],
            )
        )
        if not any(folder.glob("*.safetensors")):
            snapshot_download(
                name, revision=revision, allow_patterns=["pytorch_model*.bin", "pytorch_model.bin.index.json"]
            )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        of = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name} is no path here, and the Hugging Face hub does not give it{of} ({reason}): check the name and the "
            "connection, log in with `hf auth login`, or give a folder"
        ) from None
    return folder
