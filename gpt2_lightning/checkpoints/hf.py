"""Hugging Face's GPT-2 format: parameter names, reading from a folder or the hub, and writing a folder."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2_lightning import __version__
from gpt2_lightning.checkpoints.ours import torch_load
from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer

# Conv1D in HF, which stores (in, out); nn.Linear stores (out, in)
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# keys of config.json that change the network but no shape, and the values that describe ours; the first is HF's default
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
# HF's defaults for keys that config.json may omit
_DEFAULT_SHAPE = {"n_positions": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
_SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors")
_TORCH_FILES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
_PARTIAL = ".partial"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


# -- parameter names ---------------------------------------------------------------------------------------------------


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """HF's names and orientation → ours. Accepts names with and without ``transformer.``, and drops mask buffers.

    The tensors are views. The head is dropped if it equals the embedding, to which it is tied.
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
    """Our names and orientation → ``GPT2LMHeadModel``'s, without the tied head. The inverse of ``from_hf``."""
    return {
        name: (t.t() if name.endswith(_TRANSPOSED) else t).contiguous()
        for name, t in state.items()
        if name != "lm_head.weight"
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Config and weights, by our names, of a folder as ``save_pretrained`` writes it.

    Raises:
        FileNotFoundError: there is no ``config.json``.
        UserError: the weights are missing, a file is damaged, or the architecture is not GPT-2's.
    """
    return _read_config(folder / "config.json"), from_hf(_read_weights(folder))


def download(name: str, revision: str | None) -> Path:
    """Downloads a model from the hub, unless it is in the cache, and returns its folder there.

    Raises:
        UserError: there is no such model, or no connection to the hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", *_SAFETENSORS]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=list(_TORCH_FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"{name} is not a local path, and the Hugging Face hub does not provide it{at} "
            f"({str(error).splitlines()[0]}): check the name and the connection, log in with `hf auth login`, "
            "or give a folder"
        ) from None
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: it is not valid JSON ({error})") from None
    return content


def _read_config(path: Path) -> GPTConfig:
    config = _read_json(path)
    if config.get("model_type") != "gpt2":
        raise UserError(f"{path} describes the architecture {config.get('model_type')!r}: only 'gpt2' can be loaded")
    shape = {key: config.get(key, default) for key, default in _DEFAULT_SHAPE.items()}
    for key, allowed in _FIXED.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path} has {key} = {config[key]!r}: GPT-2 has {allowed[0]!r}")
    return GPTConfig(block_size=shape.pop("n_positions"), **shape)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for pattern in (*_SAFETENSORS, *_TORCH_FILES):
        if files := sorted(folder.glob(pattern)):
            return {name: tensor for file in files for name, tensor in _read_weight_file(file).items()}
    raise UserError(f"{folder} has no weights: expected {_SAFETENSORS[0]} or {_TORCH_FILES[0]}, whole or in parts")


def _read_weight_file(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        state: dict[str, Tensor] = torch_load(path)
        return state
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or truncated ({error}): download or export it again") from None


# -- writing -----------------------------------------------------------------------------------------------------------


def write_folder(
    model: GPT, out: Path, dtype: torch.dtype = torch.float32, metrics: Mapping[str, str] | None = None
) -> None:
    """Writes ``model`` as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open without a network.

    Everything is written into a temporary folder first, then renamed into place. An earlier export in ``out`` is
    replaced, other files there stay. There are no tokenizer files if the vocabulary is not GPT-2's.

    Args:
        metrics: rows of the model card's table, name → value.

    Raises:
        UserError: ``out`` contains files but no earlier export, or the weights cannot be written.
    """
    _check_out(out)
    config = _config_json(model.config, dtype)
    state = to_hf({name: t.detach().cpu().to(dtype) for name, t in model.state_dict().items()})
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: config["vocab_size"]].contiguous()
    parameters = {"parameters": f"{sum(tensor.numel() for tensor in state.values()):,}"}
    card = _model_card(out.resolve().name, config, parameters | dict(metrics or {}))
    texts = {"config.json": _json(config), "README.md": card}
    if config["vocab_size"] == VOCAB_SIZE:
        texts |= _tokenizer_files(model.config.block_size)

    partial = out / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # from an export that was killed
    partial.mkdir(parents=True)
    try:
        save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        shutil.copymode(partial / "config.json", partial / "model.safetensors")  # safetensors makes it 0600
        for file in list(partial.iterdir()):
            os.replace(file, out / file.name)
        for name in set(_TOKENIZER_FILES) - set(texts):  # left by an earlier export with GPT-2's vocabulary
            (out / name).unlink(missing_ok=True)
    except SafetensorError as error:  # safetensors wraps the system's error, such as a full disk
        raise UserError(f"{out} cannot be written ({error}): free some space and run the same command again") from None
    finally:
        shutil.rmtree(partial)


def _check_out(out: Path) -> None:
    config = out / "config.json"
    is_export = config.is_file() and "exported_by" in _read_json(config)
    if not is_export and any(entry.name != _PARTIAL for entry in out.glob("*")):
        raise UserError(f"{out} contains files that are not an earlier export and could be lost: name a new folder")


def _config_json(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of ``config.json``. The vocabulary has no padding: at most GPT-2's 50,257 rows."""
    vocab_size = min(config.vocab_size, VOCAB_SIZE)
    end_of_text = END_OF_TEXT if vocab_size == VOCAB_SIZE else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "exported_by": f"gpt2_lightning {__version__}",  # marks the folder as one that a later export may replace
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "dtype": str(dtype).removeprefix("torch."),
        "embd_pdrop": 0.0,
        "eos_token_id": end_of_text,
        "layer_norm_epsilon": 1e-5,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "n_positions": config.block_size,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "vocab_size": vocab_size,
    }


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _tokenizer_files(block_size: int) -> dict[str, str]:
    """GPT-2's BPE in the files of ``tokenizers`` and ``transformers``, made from our own tokenizer: name → text."""
    encoding = get_tokenizer()
    characters = _byte_characters()
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(END_OF_TEXT)]
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    end_of_text = "<|endoftext|>"
    vocab = {spell(token): rank for token, rank in ranks.items()} | {end_of_text: END_OF_TEXT}
    # ranks 0-255 are the bytes, then each rank is one merge
    merges = [" ".join(map(spell, _merge(token, ranks))) for token in tokens[256:]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "added_tokens": [{"id": END_OF_TEXT, "content": end_of_text, "special": True} | flags],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
    }
    return dict(zip(_TOKENIZER_FILES, (_json(tokenizer), _json(settings)), strict=True))


def _byte_characters() -> dict[int, str]:
    """GPT-2's character for each byte: itself if it is printable Latin-1, otherwise the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two tokens that are merged into ``token``: its byte-pair encoding, stopped before the last merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _model_card(name: str, config: Mapping[str, Any], rows: Mapping[str, str]) -> str:
    """README.md with a table of config.json's shape and of ``rows``."""
    shape = {key: config[key] for key in (*_DEFAULT_SHAPE, "dtype")}
    table = "\n".join(f"| {key} | {value} |" for key, value in (shape | dict(rows)).items())
    if config["vocab_size"] == VOCAB_SIZE:
        tokenizer = f'The tokenizer is GPT-2\'s: `AutoTokenizer.from_pretrained("{name}")`.'
    else:
        tokenizer = "The vocabulary is not GPT-2's: the model takes token ids, and the folder has no tokenizer."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A GPT-2 exported by {config["exported_by"]}. Load it with `AutoModelForCausalLM.from_pretrained("{name}")`.
{tokenizer}

| | |
|---|---|
{table}
"""
