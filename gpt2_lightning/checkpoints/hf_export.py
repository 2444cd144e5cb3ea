"""An export in Hugging Face's format: config, weights, tokenizer files and model card, in one folder."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt2_lightning import __version__
from gpt2_lightning.checkpoints.hf import read_json, to_hf
from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer

# marks a folder as ours, which a later export may replace
_EXPORTED_BY = f"gpt2_lightning {__version__}"
_PARTIAL = ".partial"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def hf_config(config: GPTConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The ``config.json`` of an export: GPT-2's 50,257 rows without the padding; fewer are left as they are."""
    vocab_size = min(config.vocab_size, VOCAB_SIZE)
    end_of_text = END_OF_TEXT if vocab_size == VOCAB_SIZE else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "exported_by": _EXPORTED_BY,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "dtype": str(dtype).removeprefix("torch."),
        "embd_pdrop": 0.0,
        "eos_token_id": end_of_text,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_inner": None,
        "n_layer": config.n_layer,
        "n_positions": config.block_size,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": True,
        "vocab_size": vocab_size,
    }


def export_folder(
    model: GPT, out: Path, dtype: torch.dtype = torch.float32, figures: Mapping[str, str] | None = None
) -> None:
    """Write ``model`` as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open without a network.

    Everything is written aside first and then renamed into place; an earlier export in ``out`` is replaced, other files
    there are left alone. A vocabulary that is not GPT-2's gets no tokenizer files.

    Args:
        figures: what the run measured, for the model card: name → value.

    Raises:
        ValueError: ``out`` is a file, or a folder that is neither empty nor an earlier export; the weights cannot be
            written.
    """
    _refuse_foreign(out)
    config = hf_config(model.config, dtype)
    state = to_hf({name: t.detach().cpu().to(dtype) for name, t in model.state_dict().items()})
    state["transformer.wte.weight"] = state["transformer.wte.weight"][: config["vocab_size"]].contiguous()
    texts = {"config.json": _json(config), "README.md": _model_card(out.resolve().name, model, config, figures or {})}
    if config["vocab_size"] == VOCAB_SIZE:
        texts |= _tokenizer_files(model.config.block_size)

    partial = out / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        shutil.copymode(partial / "config.json", partial / "model.safetensors")  # safetensors lets only the owner read
        for file in partial.iterdir():
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        for file in list(partial.iterdir()):
            os.replace(file, out / file.name)
        for name in set(_TOKENIZER_FILES) - set(texts):  # an earlier export with GPT-2's vocabulary
            (out / name).unlink(missing_ok=True)
    except SafetensorError as error:  # its own word for what the system says
        raise UserError(
            f"{out} cannot be written ({error}): make room, and run the same command again: what was there before is "
            "whole"
        ) from None
    finally:
        shutil.rmtree(partial)


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a new folder to export to")
    if not out.is_dir() or all(entry.name == _PARTIAL for entry in out.iterdir()):
        return
    config = out / "config.json"
    if not config.is_file() or "exported_by" not in read_json(config):
        raise UserError(f"{out} holds files that are not an earlier export, which could be lost: name a new folder")


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it is printable Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def _merge(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The two parts whose merge makes ``token``: its byte-pair encoding, stopped one merge before the end."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _tokenizer_files(block_size: int) -> dict[str, str]:
    """GPT-2's BPE as ``tokenizers`` and ``transformers`` read it, by file name, from the ranks of our own tokenizer."""
    encoding = get_tokenizer()
    characters = _byte_characters()
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(END_OF_TEXT)]
    ranks = {token: rank for rank, token in enumerate(tokens)}

    def spell(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    end_of_text = "<|endoftext|>"
    vocab = {spell(token): rank for token, rank in ranks.items()} | {end_of_text: END_OF_TEXT}
    # a rank is the number of a merge, after the 256 bytes
    merges = [" ".join(map(spell, _merge(token, ranks))) for token in tokens[256:]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"id": END_OF_TEXT, "content": end_of_text, "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added | {"normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": block_size,
        "add_prefix_space": False,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "unk_token": end_of_text,
    }
    merges_txt = "\n".join(["#version: 0.2", *merges, ""])
    texts = (_json(tokenizer), _json(settings), json.dumps(vocab, ensure_ascii=False), merges_txt)
    return dict(zip(_TOKENIZER_FILES, texts, strict=True))


def _model_card(name: str, model: GPT, config: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    c = model.config
    padding = (c.vocab_size - config["vocab_size"]) * c.n_embd
    shape = {
        "parameters": f"{model.num_parameters() - padding:,}",
        "n_layer, n_head, n_embd": f"{c.n_layer}, {c.n_head}, {c.n_embd}",
        "context": f"{c.block_size:,} tokens",
        "vocabulary": f"{config['vocab_size']:,}",
        "stored as": config["dtype"],
    }
    rows = "\n".join(f"| {what} | {value} |" for what, value in (shape | dict(figures)).items())
    if config["vocab_size"] == VOCAB_SIZE:
        ids = f'AutoTokenizer.from_pretrained("{name}")("The meaning of life is", return_tensors="pt").input_ids'
        note = "The tokenizer is GPT-2's; every training document begins with `<|endoftext|>`."
    else:
        ids = "torch.tensor([[1, 2, 3]])"
        note = "The vocabulary is not GPT-2's, so no tokenizer comes with the weights: feed it token ids."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, gpt2_lightning]
---

# {name}

A GPT-2 in the format of `transformers`, exported by {_EXPORTED_BY}.

| | |
|---|---|
{rows}

{note}

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
ids = {ids}
print(model.generate(ids, max_new_tokens=50, do_sample=True, top_k=50))
```
"""
