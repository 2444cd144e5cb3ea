"""A folder with good and bad recipes, data and checkpoints and a finished run, for the commands that the tests call."""

import contextlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from gpt2_lightning.__main__ import main
from gpt2_lightning.model import GPT, GPTConfig

TINY = """
trainer: {max_steps: 6, accelerator: cpu}
model:
  config: {block_size: 16, vocab_size: 64, n_layer: 2, n_head: 2, n_embd: 16}
  optimizer: {class_path: gpt2_lightning.optim.AdamW, init_args: {lr: 3.0e-3}}
  lr_scheduler: {class_path: gpt2_lightning.schedule.WarmupCosine, init_args: {warmup_steps: 2, min_lr: 3.0e-4}}
data: {root: shards, source: null, total_batch_tokens: 128, micro_batch_size: 4}
validation: {every_n_steps: 3, tokens: 512}
hellaswag: {every_n_steps: 0, path: examples.jsonl}
samples: {every_n_steps: 0, max_new_tokens: 4}
checkpoint: {every_n_steps: 3}
run_dir: new
"""
BPE = TINY.replace(
    "vocab_size: 64, n_layer: 2, n_head: 2, n_embd: 16", "vocab_size: 50304, n_layer: 1, n_head: 1, n_embd: 2"
)
EXAMPLE = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}
FILES = {
    "tiny.yaml": TINY,
    "bpe.yaml": BPE,
    "cut.yaml": "trainer: {max_steps: [",
    "list.yaml": "- trainer\n- model\n",
    "docs.jsonl": "".join(json.dumps({"text": f"document {i} " * 50}) + "\n" for i in range(30)),
    "damaged.jsonl": '{"text": "whole"}\n{"text": \n',
    "examples.jsonl": 2 * (json.dumps(EXAMPLE) + "\n"),
    "poem.txt": "Tyger Tyger, burning bright\n" * 50,
    "empty.txt": "",
    "text.ckpt": "hello",
    "file": "a file",
    "mine/notes.txt": "files that no export wrote",
}
SHORTHANDS: dict[str, str] = yaml.safe_load((Path(__file__).parent / "wrong_invocations.yaml").read_text())[
    "shorthands"
]


def arguments(line: str) -> list[str]:
    """The arguments of a command line whose first word may be a shorthand of wrong_invocations.yaml."""
    first, _, rest = line.partition(" ")
    return shlex.split(f"{SHORTHANDS.get(first, first)} {rest}")


def files() -> dict[str, bytes]:
    """Every file below the working folder, except empty lock files."""
    paths = (path for path in Path().rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path): path.read_bytes() for path in paths}


def _write_shards(root: Path, train: Any = 20_000, val: int = 2_000) -> None:
    rng = np.random.default_rng(0)
    root.mkdir()
    for split, number, tokens in (("val", 0, val), ("train", 1, train)):
        tokens = rng.integers(0, 64, tokens) if isinstance(tokens, int) else tokens
        np.save(root / f"tiny_{split}_{number:06d}.npy", np.asarray(tokens, dtype=np.uint16))


def _write_weights(path: Path, **shape: int) -> None:
    shape = {"block_size": 16, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 2} | shape
    state = {f"model.{name}": value for name, value in GPT(GPTConfig(**shape)).state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": shape}}, path)


def make_example_folder(root: Path) -> None:
    for name, content in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    (root / "folder").mkdir()
    _write_shards(root / "shards")
    _write_shards(root / "others", train=20_001)
    _write_shards(root / "short", val=16)
    _write_shards(root / "beyond", train=[*[0] * 4_000, 64, *[0] * 1_000])
    _write_shards(root / "truncated")
    shard = root / "truncated" / "tiny_train_000001.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    _write_weights(root / "bpe.ckpt")
    _write_weights(root / "tiny.ckpt", vocab_size=64)
    torch.save({"model": {}}, root / "foreign.ckpt")
    with contextlib.chdir(root):
        assert main(arguments("FIT --run_dir run")) == 0
        assert main(arguments("PREPARE --out prepared")) == 0
    for name in ("tampered", "half"):
        shutil.copytree(root / "prepared", root / name)
    shard = next((root / "tampered").glob("*train*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    manifest = json.loads((root / "half" / "manifest.json").read_text())
    (root / "half" / "manifest.json").write_text(json.dumps(manifest | {"resume": {}}))
