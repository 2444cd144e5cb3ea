"""Misuse: what is wrong ends with its exit code and one sentence that names the thing and the mend; nothing is lost.

First a table of wrong invocations, then what goes wrong while a command runs: a right that is missing, a disk that is
full, Ctrl-C at each stage, a clock that jumps, a hub that refuses.
"""

import contextlib
import ctypes
import hashlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import tqdm.std
from lightning.pytorch.utilities import rank_zero_only

from gpt2_lightning.__main__ import main
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tools.runs import read_run

slow = pytest.mark.slow
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and permissions are POSIX")

# -- what is on disk before --------------------------------------------------------------------------------------------

TINY = """
trainer: {max_steps: 6, accelerator: cpu}
model:
  config: {block_size: 16, vocab_size: 64, n_layer: 2, n_head: 2, n_embd: 16}
  optimizer: {class_path: gpt2_lightning.optim.AdamW, init_args: {lr: 3.0e-3}}
  lr_scheduler: {class_path: gpt2_lightning.schedule.WarmupCosine, init_args: {warmup_steps: 2, min_lr: 3.0e-4}}
data: {root: shards, source: null, total_batch_tokens: 128, micro_batch_size: 4}
validation: {every_n_steps: 3, tokens: 512}
hellaswag: {every_n_steps: 0, path: rows.jsonl}
samples: {every_n_steps: 0, max_new_tokens: 4}
checkpoint: {every_n_steps: 3}
run_dir: new
"""
BPE = TINY.replace(
    "vocab_size: 64, n_layer: 2, n_head: 2, n_embd: 16", "vocab_size: 50304, n_layer: 1, n_head: 1, n_embd: 2"
)
ROW = {"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0}
SHORT = {  # the first word of a command line below → what it stands for
    "FIT": "fit --config tiny.yaml",
    "FIT-BPE": "fit --config bpe.yaml",
    "VALIDATE": "validate --config tiny.yaml",
    "PLAN": "plan --json --config tiny.yaml",
    "GENERATE": "generate bpe.ckpt --prompt hi --max_new_tokens 2",
    "SCORE": "hellaswag bpe.ckpt --json",
    "BENCH": "bench --json --device cpu --block_size 8 --n_layer 1 --n_embd 8 --micro_batch_size 1",
    "PREPARE": "prepare --source docs.jsonl --shard_tokens 500 --workers 1",
}


def _arguments(line: str) -> list[str]:
    first, _, rest = line.replace("LONG", "x" * 300).partition(" ")
    return shlex.split(f"{SHORT.get(first, first)} {rest}")


def _write_shards(root: Path, train: Any = 20_000, val: int = 2_000) -> None:
    """Build-nanogpt's shards of random tokens below 64, or of the tokens given."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for split, number, tokens in (("val", 0, val), ("train", 1, train)):
        tokens = rng.integers(0, 64, tokens) if isinstance(tokens, int) else tokens
        np.save(root / f"tiny_{split}_{number:06d}.npy", np.asarray(tokens, dtype=np.uint16))


def _write_weights(path: Path, **shape: int) -> None:
    """Weights alone in a checkpoint's layout, which `load` opens."""
    shape = {"block_size": 16, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 2} | shape
    state = {f"model.{name}": value for name, value in GPT(GPTConfig(**shape)).state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": shape}}, path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recipes, data, checkpoints and a run, good ones and others."""
    root = tmp_path_factory.mktemp("made")
    for name, content in {
        "tiny.yaml": TINY,
        "bpe.yaml": BPE,
        "unknown_key.yaml": TINY.replace("total_batch_tokens", "total_batch_size"),
        "number.yaml": TINY.replace("{root: shards, source: null, total_batch_tokens: 128, micro_batch_size: 4}", "5"),
        "cut.yaml": "trainer: {max_steps: [",
        "empty.yaml": "",
        "list.yaml": "- trainer\n- model\n",
        "docs.jsonl": "".join(json.dumps({"text": f"document {i} " * 50}) + "\n" for i in range(30)),
        "damaged.jsonl": '{"text": "whole"}\n{"text": \n',
        "rows.jsonl": 2 * (json.dumps(ROW) + "\n"),
        "poem.txt": "Tyger Tyger, burning bright\n" * 50,
        "empty.txt": "",
        "text.ckpt": "hello",
        "file": "a file",
        "mine/notes.txt": "no export",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    (root / "latin.yaml").write_bytes("run_dir: café\n".encode("latin-1"))
    (root / "folder").mkdir()
    _write_shards(root / "shards")
    _write_shards(root / "others", train=20_001)
    _write_shards(root / "short_val", val=16)
    _write_shards(root / "short_train", train=16)
    _write_shards(root / "beyond", train=[*[0] * 4_000, 64, *[0] * 1_000])
    _write_shards(root / "truncated")
    shard = root / "truncated" / "tiny_train_000001.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    _write_weights(root / "bpe.ckpt")
    _write_weights(root / "tiny.ckpt", vocab_size=64)
    torch.save({"model": {}}, root / "foreign.ckpt")
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert main(_arguments("FIT --run_dir run")) == 0
        assert main(_arguments("PREPARE --out prepared")) == 0
        shutil.copytree("prepared", "tampered")
        shard = next(Path("tampered").glob("*train*"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    return root


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # it looks at the environment only once


@pytest.fixture
def shared(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the folder itself, for what is to change nothing in it; new files are cleared away."""
    monkeypatch.chdir(made)
    known = set(Path().rglob("*"))
    yield
    for path in sorted(set(Path().rglob("*")) - known, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> None:
    """In a copy of the folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def _files() -> dict[str, str]:
    """What lies below the working folder: path → hash."""
    paths = (path for path in Path().rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# -- wrong invocations -------------------------------------------------------------------------------------------------

MEND = re.compile(
    r"\b(give|set|choose|correct|name|lower|raise|leave|make|run|train|prepare|start|see|take|fetch|install|check|wait|"
    r"shorten|needs|required|score|expected|convert)\b"
)


TABLE = r"""
# usage
nonsense
    2 no command 'nonsense' … choose from fit, validate, prepare
fit
    2 no --config … the recipes are
fit --config absent.yaml
    2 absent.yaml … does not exist … correct
fit --config folder
    2 folder … not a file … correct
FIT --trainer.max_steps
    2 --trainer.max_steps … expected one argument
FIT extra
    2 extra … gpt2 fit --help
validate --ckpt_path run/checkpoints/last.ckpt
    2 no --config
prepare
    2 --source --verify --show is required
prepare --source stdlib
    2 --out DIR
PREPARE --verify prepared
    2 --verify … --source
PREPARE --out out --workers many
    2 --workers … a whole number, not 'many'
PREPARE --out out --format txt
    2 'txt' … 'npy', 'bin'
prepare --show shards --step -1
    2 --step is -1 … at least 0
prepare --show shards --step 2305843009213693952
    2 --step is 23058 … a step of the run
generate
    2 required: PATH
GENERATE --num_samples 0
    2 --num_samples … at least 1
GENERATE --seed -1
    2 --seed is -1: give a whole number from 0
GENERATE --topk 5
    2 --topk 5 … gpt2 generate --help
hellaswag --json
    2 required: PATH
SCORE --style openai
    2 'openai' … 'nanogpt', 'harness'
export bpe.ckpt
    2 required: OUT
export a b --format gguf
    2 'gguf' … 'hf', 'llmc'
export a b --dtype fp16
    2 'fp16' … 'fp32', 'bf16'
bench --json --device tpu
    2 no device tpu here … choose from
BENCH --rungs warp
    2 no rung warp … choose from fp32,tf32
BENCH --n_embd 0
    2 --n_embd is 0 … at least 1
BENCH --n_layer two
    2 --n_layer … a whole number, not 'two'
plan --json
    2 no --config
PLAN --gpu h10
    2 no GPU 'h10' … h100 … 24GB
PLAN --mfu nan
    2 --mfu is nan … such as 0.4
PLAN --micro_batch_size three
    2 is three … give a whole number or auto
report
    2 required: RUN_DIR

# recipe
fit --config cut.yaml
    2 cut.yaml is no YAML … line 1 … correct it
fit --config empty.yaml
    2 empty.yaml holds no settings … give a recipe
plan --json --config list.yaml
    2 list.yaml holds no settings … give a recipe
fit --config latin.yaml
    2 latin.yaml is no YAML in UTF-8 … correct it
fit --config unknown_key.yaml
    2 total_batch_size … correct it
fit --config number.yaml
    2 number.yaml has data: 5 … correct it
FIT --modell.compile true
    2 --modell.compile … gpt2 fit --help

# model
FIT --model.foo 1
    2 --model.foo … correct it
FIT --model.config.n_layers 2
    2 n_layers … correct it
FIT --model.config.n_layer two
    2 n_layer is two: give a whole number
FIT --model.config.n_layer 0
    1 n_layer is 0 … at least 1
FIT --model.config.n_head 3
    1 n_head=3 does not divide n_embd=16 … set n_head to one of [1, 2, 4, 8]
FIT --model.config.vocab_size 1000000000000
    1 vocab_size is 1000000000000 … give a whole number … below 16777216
FIT --model.config.n_embd 4194304
    1 too little memory … lower … model.config
FIT --model.init_from absent.ckpt
    1 absent.ckpt does not exist … hub name
FIT --model.init_from run/checkpoints/last.ckpt --model.config.n_embd 32
    1 n_embd=32 (theirs: 16) … set model.config to null
FIT --model.optimizer Foo
    2 model.optimizer is Foo … the import path of a class
FIT --model.optimizer torch.optim.LBFGS
    1 LBFGS … choose … parameter groups
FIT --model.optimizer.momentun 1
    2 momentun … correct it
FIT --model.optimizer.lr -1
    1 learning rate: -1.0 … correct its arguments
FIT --model.optimizer.lr nan
    2 lr is nan … give a number
FIT --model.optimizer.betas [0.9]
    2 betas is [0.9] … give a list of 2
FIT --model.optimizer gpt2_lightning.optim.Muon --model.optimizer.momentum 1.5
    1 momentum=1.5 … correct its arguments
FIT --model.lr_scheduler Foo
    2 model.lr_scheduler is Foo … the import path of a class
FIT --model.lr_scheduler gpt2_lightning.schedule.Warmup
    1 model.lr_scheduler … choose
FIT --model.lr_scheduler torch.optim.lr_scheduler.StepLR
    2 step_size … required
FIT --model.lr_scheduler torch.optim.lr_scheduler.ReduceLROnPlateau
    1 model.lr_scheduler waits for a metric … choose one that counts steps
FIT --model.lr_scheduler.min_lr 1
    1 lr_scheduler.min_lr is 1 … not more than
FIT --model.lr_scheduler.warmup_steps -1
    1 warmup_steps is -1 … give 0 or more
FIT --model.lr_scheduler.max_steps 1
    1 lr_scheduler.max_steps=1 … lower warmup_steps or raise max_steps
FIT --model.compile maybe
    2 model.compile is maybe … give auto, true or false

# data
FIT --data.root nowhere
    1 there is no folder nowhere … correct data.root
FIT --data.root file
    1 there is no folder file … correct data.root
FIT --data.root folder
    1 folder holds no val shard … prepare it again
FIT-BPE --data.root out --data.source absent.txt
    1 absent.txt … correct the path of --source
FIT-BPE --data.root out --data.source empty.txt
    1 empty.txt holds no text … give
FIT-BPE --data.root out --data.source fineweb
    1 'fineweb' is no source … give stdlib
FIT-BPE --data.root prepared --data.source poem.txt
    1 source is docs.jsonl there and poem.txt here … choose another folder
FIT --data.root short_val
    1 the validation split in short_val has 16 tokens … 17 … lower model.config.block_size
FIT --data.root short_train
    1 the training split in short_train has 16 tokens … 17 … lower model.config.block_size
FIT --data.root beyond
    1 token id 64 in  … vocab_size=64 … set vocab_size to at least 65
FIT --data.root truncated
    1 tiny_train_000001.npy … prepare it again
FIT --data.order random
    2 data.order is random … give sequential or shuffled
FIT --data.seed -1
    1 data.seed is -1 … give a whole number from 0
FIT --data.seed 1000000000000000000000000000000
    1 data.seed is 1000 … give a whole number from 0
FIT --data.num_workers -1
    1 data.num_workers is -1 … give a whole number from 0
FIT --data.total_batch_tokens 0
    1 data.total_batch_tokens is 0 … at least 1
FIT --data.total_batch_tokens 100
    1 total_batch_tokens=100 … set it to a multiple of 16
FIT --data.micro_batch_size 3
    1 total_batch_tokens=128 … set data.micro_batch_size to one of [1, 2, 4, 8]
FIT --data.batch_size_schedule.start_tokens 48 --data.batch_size_schedule.ramp_tokens 100
    1 start_tokens=48 … set it to one of [128, 64
FIT --data.validation_tokens 64
    2 data.validation_tokens … validation.tokens

# section
FIT --validation.every_n_steps -1
    1 validation.every_n_steps is -1 … 0 for never
FIT --validation.every_n_steps 0.5
    2 every_n_steps is 0.5 … a whole number
FIT --validation.tokens 0
    1 validation.tokens is 0 … give at least 1
FIT --hellaswag.every_n_steps -1
    1 hellaswag.every_n_steps is -1 … 0 for never
FIT --hellaswag.style gpt
    2 hellaswag.style is gpt … give nanogpt or harness
FIT-BPE --hellaswag.every_n_steps 1 --hellaswag.path absent.jsonl
    1 absent.jsonl: no such file … give a HellaSwag .jsonl
FIT-BPE --hellaswag.every_n_steps 1 --hellaswag.style harness
    1 activity_label … take style nanogpt
FIT --samples.every_n_steps -1
    1 samples.every_n_steps is -1 … 0 for never
FIT-BPE --samples.every_n_steps 1 --samples.num_samples 0
    1 samples.num_samples=0 … give at least 1
FIT-BPE --samples.every_n_steps 1 --samples.temperature 0
    1 samples.temperature is 0 … give a number above 0
FIT-BPE --samples.every_n_steps 1 --samples.seed 1000000000000000000000000000000
    1 samples.seed is 1000 … give a whole number from 0
FIT-BPE --samples.every_n_steps 1 --samples.prompt 'a a a a a a a a a a a a a a a a a a a a '
    1 samples.prompt has 21 tokens … block_size is 16 … give 1 to 16
FIT --checkpoint.every_n_steps -1
    1 checkpoint.every_n_steps is -1 … 0 for never
FIT --nonfinite.stop_after -1
    1 nonfinite.stop_after is -1 … 0 for never
FIT --nonfinite.stop_after never
    2 stop_after is never … give a whole number
FIT --resume maybe
    2 resume is maybe … give auto, must or never
FIT --resume must
    1 last.ckpt does not exist … resume is must … check run_dir
FIT --run_dir run --resume never
    1 last.ckpt exists … resume is never … choose another run_dir
FIT --run_dir file
    1 file/checkpoints cannot be written to … choose another run_dir
FIT --run_dir ''
    1 run_dir is empty … give the folder
FIT --run_dir LONG
    1 name too long … choose another run_dir
FIT --seed_everything -5
    1 seed_everything is -5 … a whole number from 0
FIT --seed_everything x
    2 seed_everything is x … true, false or a whole
VALIDATE --expected '{val/loss: high}'
    2 expected is high … give a number

# resuming
FIT --run_dir run --trainer.max_steps 9 --model.config.n_embd 32
    1 n_embd=32 (theirs: 16) … resume … another run_dir
FIT --run_dir run --trainer.max_steps 9 --data.seed 5
    1 seed=1337, not 5 … another run_dir
FIT --run_dir run --trainer.max_steps 9 --data.order shuffled
    1 order=sequential, not shuffled … another run_dir
FIT --run_dir run --trainer.max_steps 9 --data.total_batch_tokens 64
    1 total_batch_tokens=128, not 64 … another run_dir
FIT --run_dir run --trainer.max_steps 9 --data.root others
    1 other shards than those in others … another run_dir
FIT --run_dir run --trainer.max_steps 9 --seed_everything 7
    1 seed_everything=1337, not 7 … another run_dir
FIT --run_dir run --trainer.max_steps 9 --model.optimizer gpt2_lightning.optim.Muon
    1 trained with AdamW, not Muon … --model.init_from

# trainer
FIT --trainer.max_stepz 1
    2 --trainer.max_stepz … gpt2 fit --help
FIT --trainer.max_steps -1
    1 trainer.max_steps is not set … give the number
FIT --trainer.max_steps 0
    1 trainer.max_steps is 0 … give the number
FIT --trainer.max_steps 1.5
    2 trainer.max_steps is 1.5 … give a whole number
FIT --trainer.max_epochs 0
    1 trainer.max_epochs … give trainer.max_steps
FIT --trainer.min_steps 3
    1 trainer.min_steps … leave it out
FIT --trainer.max_time soon
    1 soon … DD:HH:MM:SS … correct
FIT --trainer.accelerator foo
    1 'foo' … Available names … correct
FIT --trainer.accelerator tpu
    1 torch_xla … correct the trainer section
FIT --trainer.precision fp8
    2 trainer.precision is fp8 … bf16-mixed
FIT --trainer.precision bf16-true
    1 bf16-true … give bf16-mixed
FIT --trainer.precision transformer-engine
    1 transformer_engine … pip install
FIT --trainer.gradient_clip_val -1
    1 trainer.gradient_clip_val is -1 … 0 for never
FIT --trainer.gradient_clip_algorithm value
    1 clipped by the global norm … leave it
FIT --trainer.log_every_n_steps -1
    1 trainer.log_every_n_steps is -1 … 0 for never
FIT --trainer.accumulate_grad_batches 4
    1 accumulate_grad_batches=4 … takes 2 micro-batches on 1 device … leave it out
FIT --trainer.overfit_batches 1
    1 overfit_batches=1 … set data.total_batch_tokens … 64
FIT --trainer.limit_train_batches 3
    1 limit_train_batches … set trainer.max_steps
FIT --trainer.fast_dev_run true
    1 fast_dev_run … set trainer.max_steps
FIT --trainer.val_check_interval 2
    1 val_check_interval … validation.every_n_steps
FIT --trainer.check_val_every_n_epoch 0
    1 check_val_every_n_epoch … validation.every_n_steps
FIT --trainer.default_root_dir x
    1 trainer.default_root_dir … give run_dir
FIT --trainer.use_distributed_sampler true
    1 use_distributed_sampler … leave it out
FIT --trainer.callbacks Foo
    2 trainer.callbacks is Foo … the import path of a class
FIT --trainer.logger Foo
    2 trainer.logger is Foo … the import path of a class

# devices
FIT --trainer.devices 0
    1 devices='0' … correct the trainer section
FIT --trainer.devices many
    1 `devices` … should be an int > 0 … correct
FIT --trainer.devices -3
    1 `devices` … should be an int > 0 … correct
FIT --trainer.num_nodes 0
    1 `num_nodes` must be a positive integer … correct
FIT --trainer.strategy foo
    1 trainer.strategy foo … give auto, ddp or fully_shard
FIT --trainer.strategy lightning.pytorch.strategies.ModelParallelStrategy
    1 ModelParallelStrategy … give fully_shard
FIT --trainer.strategy fsdp
    1 trainer.strategy fsdp … give fully_shard
VALIDATE --ckpt_path run/checkpoints/last.ckpt --trainer.strategy fsdp
    1 trainer.strategy fsdp … give fully_shard
PLAN --trainer.devices many
    1 trainer.devices is many … give their number, or auto
PLAN --gpus 3
    1 total_batch_tokens=128 is not … a multiple of 48

# launcher
WORLD_SIZE=8 FIT
    1 WORLD_SIZE=8 is set … run `unset WORLD_SIZE` first
WORLD_SIZE=two FIT
    1 WORLD_SIZE is 'two' … run `unset WORLD_SIZE` first
RANK=first FIT
    1 RANK is 'first' … start this with torchrun
RANK=first PLAN
    1 RANK is 'first' … start this with torchrun
RANK=first BENCH
    1 RANK is 'first' … start this with torchrun
NODE_RANK= FIT
    1 NODE_RANK is '' … run `unset NODE_RANK` first
SLURM_NTASKS=x FIT
    1 SLURM_NTASKS is 'x' … run `unset SLURM_NTASKS` first
PL_GLOBAL_SEED=x FIT
    1 PL_GLOBAL_SEED is 'x' … run `unset PL_GLOBAL_SEED` first
WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 FIT
    1 torchrun started 2 processes … give --trainer.devices 2
SLURM_NTASKS=8 FIT
    1 --ntasks=8 … --ntasks-per-node=8 … correct
FIT --trainer.num_nodes 2
    1 MASTER_ADDR … on every node set
MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 NODE_RANK=2 FIT --trainer.num_nodes 2
    1 NODE_RANK is 2: on 2 nodes give it a number from 0 to 1

# checkpoint
VALIDATE --ckpt_path absent.ckpt
    1 absent.ckpt
FIT --ckpt_path absent.ckpt
    1 absent.ckpt
generate absent.ckpt --prompt x
    1 absent.ckpt
hellaswag --json --examples builtin absent.ckpt
    1 absent.ckpt
export absent.ckpt out
    1 absent.ckpt
PLAN --model.config null --model.init_from absent.ckpt
    1 absent.ckpt
VALIDATE --ckpt_path text.ckpt
    1 text.ckpt
FIT --ckpt_path text.ckpt
    1 text.ckpt
generate text.ckpt --prompt x
    1 text.ckpt
hellaswag --json --examples builtin text.ckpt
    1 text.ckpt
export text.ckpt out
    1 text.ckpt
PLAN --model.config null --model.init_from text.ckpt
    1 text.ckpt
VALIDATE --ckpt_path foreign.ckpt
    1 foreign.ckpt
FIT --ckpt_path foreign.ckpt
    1 foreign.ckpt
generate foreign.ckpt --prompt x
    1 foreign.ckpt
hellaswag --json --examples builtin foreign.ckpt
    1 foreign.ckpt
export foreign.ckpt out
    1 foreign.ckpt
PLAN --model.config null --model.init_from foreign.ckpt
    1 foreign.ckpt
FIT --ckpt_path folder
    1 folder is a folder … correct ckpt_path, or leave it out
generate folder --prompt x
    1 folder holds no config.json … give that
FIT-BPE --ckpt_path bpe.ckpt
    1 bpe.ckpt is no checkpoint of a … use init_from

# validate
VALIDATE
    1 nothing to validate … give --ckpt_path FILE, or --model.init_from gpt2
VALIDATE --ckpt_path tiny.ckpt --trainer.limit_val_batches 0
    1 limit_val_batches … leave
VALIDATE --ckpt_path run/checkpoints/last.ckpt --model.config.n_embd 32
    1 n_embd=32 (theirs: 16) … set model.config to null
VALIDATE --ckpt_path tiny.ckpt --model.config null --data.root prepared
    1 token id 50256 … set vocab_size to at least 50257

# prepare
prepare --out out --source absent.txt
    1 absent.txt … correct the path
prepare --out out --source '*.parquet'
    1 *.parquet … correct the path
prepare --out out --source folder
    1 folder is a folder … name its files
prepare --out out --source tiny.yaml
    1 tiny.yaml is of a kind … .jsonl
prepare --out out --source fineweb
    1 'fineweb' is no source … give stdlib, fineweb-edu
prepare --out out --source org/name
    1 org/name … offline … name local files
prepare --out out --source damaged.jsonl
    1 damaged.jsonl line 2 … correct or remove
PREPARE --out out --text_column body
    1 no 'body' … name one of text with --text_column
PREPARE --out out --shard_tokens 0
    1 shard_tokens is 0 … at least 1
PREPARE --out out --shard_tokens 1000000000000000
    1 shard_tokens is 1000 … below 2147483648
PREPARE --out out --workers 0
    1 workers is 0 … at least 1
PREPARE --out out --revision v1
    1 --revision … leave them out
PREPARE --out file
    1 file cannot be written (File exists) … choose another folder
PREPARE --out shards
    1 shards without a manifest … choose another --out
PREPARE --out prepared --shard_tokens 400
    1 shard_tokens is 500 … choose another
prepare --verify nowhere
    1 there is no folder nowhere … make it with `gpt2 prepare
prepare --verify folder
    1 folder holds no train shard … prepare it again
prepare --verify shards
    1 shards has no manifest.json … prepare them again
prepare --verify tampered
    1 another sha256 … prepare it again
prepare --show nowhere
    1 nowhere is not the folder of a run … give one
prepare --show shards
    1 shards is not the folder of a run … give one

# generate
generate tiny.ckpt --prompt x
    1 a vocabulary of 64 … train with model.config
generate gpt2 --prompt x
    1 gpt2 is no path here … check the name
generate bpe.ckpt --prompt ''
    1 the prompt is empty … give at least one token
generate bpe.ckpt --prompt 'a a a a a a a a a a a a a a a a a a a a '
    1 21 tokens … holds 16 … shorten it
GENERATE --temperature 0
    1 temperature is 0 … give a number above 0
GENERATE --temperature nan
    1 temperature is nan … give a number above 0
GENERATE --temperature 1e-45
    1 temperature is 1e-45 … top_k=1 is greedy
GENERATE --top_k 0
    1 top_k is 0 … give a whole number of at least 1
GENERATE --top_p 1.5
    1 top_p is 1.5 … give a number above 0 and at most 1

# hellaswag
SCORE --examples absent.jsonl
    1 absent.jsonl: no such file … give a HellaSwag
SCORE --examples docs.jsonl
    1 docs.jsonl, line 1 … lacks ctx, endings, label … give
hellaswag tiny.ckpt --json --examples builtin
    1 vocab_size is 64 … score one

# export
export bpe.ckpt file
    1 file is a file … name a new folder
export bpe.ckpt mine
    1 mine holds files … name a new folder
export bpe.ckpt bpe.ckpt --format llmc
    1 bpe.ckpt exists … name a new file
export tiny.ckpt file/out
    1 file/out … Not a directory … correct the path
export bpe.ckpt file/out --format llmc
    1 file:  … name another

# other
BENCH --n_head 3
    1 n_head=3 does not divide n_embd=8 … set n_head to one of
PLAN --model.config.n_head 3
    1 n_head=3 does not divide n_embd=16 … set n_head to one of
PLAN --trainer.precision bf16-true
    1 bf16-true … give bf16-mixed
PLAN --trainer.min_steps 2
    1 trainer.min_steps … leave it out
PLAN --trainer.strategy lightning.pytorch.strategies.ModelParallelStrategy
    1 ModelParallelStrategy … give fully_shard
PLAN --trainer.gradient_clip_val -1
    1 gradient_clip_val is -1 … 0 for never
report nowhere
    1 nowhere: no such folder … give that of a run
report folder
    1 folder has no TensorBoard events … give the folder of a run
report run --out file
    1 file: File exists … name another
"""
# a command line, with what it changes in the environment in front of it; below it the exit code, and what the sentence
# has to say between the dots


def _rows() -> Iterator[Any]:
    lines = [line for line in TABLE.splitlines() if line and not line.startswith("#")]
    for line, expected in zip(lines[::2], lines[1::2], strict=True):
        environment, command = re.fullmatch(r"((?:[A-Z_]+=\S* )*)(.*)", line).groups()
        code, parts = expected.split(maxsplit=1)
        variables = dict(word.split("=") for word in environment.split())
        yield pytest.param(command, int(code), parts.split(" … "), variables, id=line)


def _assert_refused(line: str, code: int, parts: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The code, the sentence, and what was on disk before."""
    args = _arguments(line)
    before = _files()
    capsys.readouterr()
    ended = main(args)
    said = capsys.readouterr()
    *others, last = [text for text in said.err.splitlines() if text.strip()]
    assert ended == code, last
    head, _, sentence = last.partition(": error: ")
    assert head in ("gpt2", f"gpt2 {args[0]}")
    for part in parts:
        assert part in sentence
    quoted = re.compile(r"\([^()]*\)")  # what a library said
    assert ". " not in quoted.sub("", quoted.sub("", sentence)), f"two sentences: {sentence}"
    assert MEND.search(sentence), f"no mend: {sentence}"
    if code == 2:
        assert len(others) == 1
        assert others[0].startswith("usage: gpt2")
    assert "Traceback" not in said.err
    assert ": error: " not in "".join(others)
    if "--json" in args:
        assert said.out == ""
    after = _files()
    assert {path: after.get(path) for path in before} == before
    if args[0] not in ("fit", "prepare"):
        assert after == before


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(("line", "code", "parts", "environment"), list(_rows()))
def test_a_wrong_invocation_is_one_sentence_with_its_mend(line, code, parts, environment, capsys, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning keeps what NODE_RANK says
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    _assert_refused(line, code, parts, capsys)


@pytest.mark.usefixtures("shared")
@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(capsys):
    parts = ("torch finds none here", "--trainer.accelerator cpu --trainer.devices 1")
    _assert_refused("FIT --trainer.accelerator gpu", 1, parts, capsys)


# -- rights that are missing -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _rights_of_a_user() -> Iterator[None]:
    """Root without its leave to ignore permissions, so that they count as they do for everybody else."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("only Linux lets root lay down a part of its rights")
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, sets) != 0:
        pytest.skip("root may not lay down its rights here")
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


ALLOW = "give this user the right"


@pytest.mark.usefixtures("copied")
@posix
@pytest.mark.parametrize(
    ("path", "mode", "line", "parts"),
    [
        pytest.param(path, mode, line, (*parts, ALLOW), id=name)
        for name, path, mode, line, *parts in (
            ("fit: a recipe", "tiny.yaml", 0, "FIT", "tiny.yaml: Permission denied"),
            ("fit: a new run's folder", "folder", 0o555, "FIT --run_dir folder/run", "folder/run/checkpoints"),
            (
                "fit: a run's folder",
                "run/checkpoints",
                0o555,
                "FIT --run_dir run --trainer.max_steps 9",
                "run/checkpoints",
            ),
            ("fit: a checkpoint", "run/checkpoints/last.ckpt", 0, "FIT --run_dir run", "last.ckpt: Permission denied"),
            ("fit: weights", "bpe.ckpt", 0, "FIT-BPE --model.init_from bpe.ckpt", "bpe.ckpt: Permission denied"),
            ("fit: the data's folder", "shards", 0, "FIT", "shards"),
            ("fit: a shard", "shards/tiny_train_000001.npy", 0, "FIT", "tiny_train_000001.npy"),
            ("fit: a manifest", "prepared/manifest.json", 0, "FIT-BPE --data.root prepared", "manifest.json"),
            (
                "validate: a checkpoint",
                "tiny.ckpt",
                0,
                "VALIDATE --ckpt_path tiny.ckpt",
                "tiny.ckpt: Permission denied",
            ),
            ("prepare: documents", "docs.jsonl", 0, "PREPARE --out out", "docs.jsonl cannot be read"),
            ("prepare: a new folder", "folder", 0o555, "PREPARE --out folder/out", "folder/out cannot be written"),
            ("prepare: a shard to verify", "prepared", 0, "prepare --verify prepared", "prepared"),
            ("generate: a checkpoint", "bpe.ckpt", 0, "GENERATE", "bpe.ckpt: Permission denied"),
            ("hellaswag: rows", "rows.jsonl", 0, "SCORE --examples rows.jsonl", "rows.jsonl: Permission denied"),
            ("export: a new folder", "folder", 0o555, "export tiny.ckpt folder/out", "folder/out"),
            ("export: a new file", "folder", 0o555, "export bpe.ckpt folder/a.bin --format llmc", "folder/.a.bin"),
            ("plan: weights", "bpe.ckpt", 0, "PLAN --model.config null --model.init_from bpe.ckpt", "bpe.ckpt"),
            ("report: a new folder", "folder", 0o555, "report run --out folder/out", "folder/out: Permission denied"),
            ("report: a run's folder", "run", 0, "report run", "run"),
        )
    ],
)
def test_a_right_that_is_missing_is_named_and_nothing_is_lost(path, mode, line, parts, capsys):
    before = _files()
    known = Path(path).stat().st_mode
    Path(path).chmod(mode)
    try:
        with _rights_of_a_user():
            ended = main(_arguments(line))
    finally:
        Path(path).chmod(known)
    said = capsys.readouterr()
    *others, last = [text for text in said.err.splitlines() if text.strip()]
    assert ended == 1
    assert last.startswith(f"gpt2 {_arguments(line)[0]}: error: ")
    for part in parts:
        assert part in last
    assert "Traceback" not in said.err
    assert ": error: " not in "".join(others)
    after = _files()
    assert {name: after.get(name) for name in before} == before


# -- a disk that is full -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_file_beyond(size: int) -> Iterator[None]:
    """The kernel stops each write that would make a file longer, as it does on a disk that is full."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("copied")
@posix
@pytest.mark.parametrize(
    ("line", "size", "what"),
    [
        pytest.param("PREPARE --out out", 900, "out", id="prepare: a shard"),
        pytest.param("PREPARE --out out", 100, "out", id="prepare: the manifest"),
        pytest.param("FIT-BPE --data.root out --data.source docs.jsonl", 900, "out", id="fit: data", marks=slow),
        pytest.param("FIT", 60_000, "step_000003.ckpt", id="fit: a checkpoint"),
        pytest.param(
            "FIT --run_dir run --trainer.max_steps 9", 60_000, "step_000009.ckpt", id="fit: going on", marks=slow
        ),
        pytest.param("FIT", 2_000, "", id="fit: its config", marks=slow),
        pytest.param("FIT", 20, "", id="fit: events", marks=slow),
        pytest.param("export tiny.ckpt out", 1_000, "out", id="export: a folder"),
        pytest.param("export bpe.ckpt out.bin --format llmc", 100_000, "", id="export: a file"),
        pytest.param("report run --out out", 1_000, "", id="report: the page", marks=slow),
    ],
)
def test_a_full_disk_costs_nothing_and_the_same_command_goes_on(line, size, what, capsys):
    before, log = _files(), Path("run/log.txt").read_text()
    with _no_file_beyond(size):
        ended = main(_arguments(line))
    said = capsys.readouterr()
    *others, last = [text for text in said.err.splitlines() if text.strip()]
    assert ended == 1, said.err
    assert ": error: " in last
    assert what in last
    assert "File too large" in last or "the disk is full" in last
    assert "make room" in last
    assert "run the same command again" in last
    assert "Traceback" not in said.err
    assert ": error: " not in "".join(others)
    after = _files()
    for name, content in before.items():
        assert after[name] == content or name == "run/log.txt"
    assert Path("run/log.txt").read_text().startswith(log)
    assert main(_arguments(line)) == 0


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """Has this process get a SIGINT when a function is called for the n-th time."""
    handler = signal.getsignal(signal.SIGINT)

    def arm(where: str, call: int) -> None:
        owner: Any = importlib.import_module("gpt2_lightning")
        *path, name = where.split(".")
        for part in path:
            owner = (
                getattr(owner, part) if hasattr(owner, part) else importlib.import_module(f"{owner.__name__}.{part}")
            )
        plain, calls = getattr(owner, name), iter(range(1, 10**6))

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGINT)
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, interrupted)

    yield arm
    signal.signal(signal.SIGINT, handler)  # the Trainer ignores it from then on


@pytest.mark.usefixtures("copied")
@posix
@pytest.mark.parametrize(
    ("line", "where", "call"),
    [
        pytest.param("VALIDATE --run_dir run", "module.GPTModule.validation_step", 2, id="validate"),
        pytest.param("VALIDATE --run_dir run", "module.load", 1, id="validate: weights"),
        pytest.param("PREPARE --out out", "data.prepare.open_source", 1, id="prepare: the source"),
        pytest.param("PREPARE --out out", "data.prepare.write_shard", 2, id="prepare: a shard"),
        pytest.param("PREPARE --out out", "data.prepare.write_manifest", 3, id="prepare: the manifest"),
        pytest.param("prepare --verify prepared", "data.shards.open_shard", 1, id="prepare: verify"),
        pytest.param("GENERATE", "generate.pick", 2, id="generate"),
        pytest.param("SCORE --examples rows.jsonl", "evals.hellaswag.token_losses", 1, id="hellaswag"),
        pytest.param("export tiny.ckpt out", "hf_export.save_file", 1, id="export"),
        pytest.param("export bpe.ckpt out.bin --format llmc", "llmc.os.fsync", 1, id="export: llm.c"),
        pytest.param("PLAN", "plan.memory", 1, id="plan"),
        pytest.param("BENCH --n_head 1 --rungs fp32", "bench_table.limits", 1, id="bench"),
        pytest.param("report run", "report.draw_panel", 1, id="report"),
    ],
)
def test_ctrl_c_ends_a_command_with_130_and_nothing_is_lost(line, where, call, interrupt_in, capsys):
    before = _files()
    args = _arguments(line)
    interrupt_in(where, call)
    assert main(args) == 130
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    again = ": the same command goes on from what is saved" if args[0] == "prepare" else ""
    assert last == f"gpt2 {args[0]}: interrupted{again}"
    assert "Traceback" not in said.err
    if "--json" in args:
        assert said.out == ""
    after = _files()
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if name.endswith((".tmp", ".partial"))]
    if args[0] == "prepare" and "--out" in args:
        assert main(args) == 0
        for path in Path("prepared").glob("*.npy"):
            assert (Path("out") / path.name).read_bytes() == path.read_bytes()


EVALUATED = "--hellaswag.every_n_steps 3 --samples.every_n_steps 3 --data.root prepared"


@pytest.mark.usefixtures("copied")
@posix
@pytest.mark.parametrize(
    ("line", "where", "call"),
    [
        pytest.param(
            "FIT-BPE --data.root out --data.source docs.jsonl", "data.prepare.write_shard", 1, id="the data", marks=slow
        ),
        pytest.param("FIT", "module.GPT", 1, id="the network", marks=slow),
        pytest.param("FIT", "data.datamodule.TokenDataModule.setup", 1, id="the shards", marks=slow),
        pytest.param("FIT", "module.GPTModule.configure_optimizers", 1, id="the optimizer", marks=slow),
        pytest.param("FIT", "module.GPTModule.validation_step", 1, id="the first validation", marks=slow),
        pytest.param("FIT", "module.GPTModule.training_step", 1, id="the first step", marks=slow),
        pytest.param("FIT", "module.GPTModule.training_step", 6, id="a step", marks=slow),
        pytest.param("FIT", "module.GPTModule.validation_step", 10, id="a validation"),
        pytest.param(f"FIT-BPE {EVALUATED}", "callbacks.hellaswag.evaluate", 2, id="HellaSwag", marks=slow),
        pytest.param(f"FIT-BPE {EVALUATED}", "callbacks.samples.generate", 2, id="samples", marks=slow),
        pytest.param("FIT", "callbacks.checkpoint.torch.save", 1, id="a checkpoint", marks=slow),
        pytest.param("FIT", "callbacks.checkpoint._point", 1, id="its other names", marks=slow),
        pytest.param("FIT", "module.GPTModule.training_step", 12, id="the last step", marks=slow),
    ],
)
def test_ctrl_c_at_any_stage_of_a_run_leaves_it_as_if_it_had_not_been(line, where, call, interrupt_in, capsys):
    before = _files()
    args = _arguments(line)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_in(where, call)
        ended = main(args)
        patch.undo()
    said = capsys.readouterr()
    assert ended == 130, said.err
    assert "Traceback" not in said.err
    begun = "SIGINT: stopped after step" in said.out
    assert "the same command goes on from" in (said.out if begun else said.err.splitlines()[-1])
    after = _files()
    assert {name: after.get(name) for name in before} == before
    assert main(args) == 0
    if line != "FIT":  # which "run" is the whole of
        shutil.rmtree("run")
        assert main([*args, "--run_dir", "run"]) == 0
    assert Path("new/log.txt").read_text() == Path("run/log.txt").read_text()
    ours, theirs = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("new", "run"))
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0)


# -- a clock that jumps ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("jump", [-3600.0, 86400.0, pytest.param(-2e9, marks=slow)], ids=["back", "on", "before 1970"])
def test_a_clock_that_jumps_while_a_run_trains(jump, monkeypatch, capsys, read_scalars):
    plain, calls = time.time, iter(range(10**9))
    for owner in (time, tqdm.std):
        monkeypatch.setattr(owner, "time", lambda: plain() + (jump if next(calls) > 40 else 0.0))
    assert main(_arguments("FIT")) == 0
    rates = read_scalars(Path("new"))["train/tokens_per_sec"]
    assert list(rates) == list(range(6))
    assert all(0 < rate < 1e9 for rate in rates.values())
    said = capsys.readouterr()
    assert re.search(r"time: \d+\.\d s, of which validation \d+\.\d %", said.out)
    assert not re.search(r"-\d", said.err)  # the bar's times and rates
    assert Path("new/log.txt").read_text() == Path("run/log.txt").read_text()


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("first", [pytest.param(4e9, marks=slow), 0.0], ids=["on, then right", "right, then back"])
def test_a_clock_that_jumps_between_two_starts(first, monkeypatch, capsys):
    plain = time.time
    monkeypatch.setattr(time, "time", lambda: plain() + first)
    assert main(_arguments("FIT --trainer.max_steps 3 --data.total_batch_tokens 64")) == 0
    monkeypatch.setattr(time, "time", lambda: plain() - (0.0 if first else 1e9))
    assert main(_arguments("FIT --data.total_batch_tokens 64")) == 0
    capsys.readouterr()
    assert main(["prepare", "--show", "new", "--step", "5"]) == 0
    assert "step 5, sample 20: train window 20" in capsys.readouterr().out
    run = read_run(Path("new"))
    assert [start.first_step for start in run.starts] == [0, 3]
    rows = [line.split() for line in Path("new/log.txt").read_text().splitlines()]
    losses = {int(step): float(value) for step, word, value in rows if word == "train"}
    assert run.curves["train/loss"].steps.tolist() == list(losses) == list(range(6))
    np.testing.assert_allclose(run.curves["train/loss"].values, list(losses.values()), atol=1e-6)


# -- whole processes ---------------------------------------------------------------------------------------------------


def _environment(home: Path, **more: str) -> dict[str, str]:
    return os.environ | {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])} | more


@pytest.mark.usefixtures("copied")
@slow
@pytest.mark.parametrize(
    "line",
    [
        "FIT --data.root nowhere",
        "FIT --model.foo 1",
        "VALIDATE",
        "prepare --verify nowhere",
        "generate absent.ckpt --prompt x",
        "hellaswag absent.ckpt --json --examples builtin",
        "export foreign.ckpt out",
        "BENCH --n_head 3",
        "PLAN --gpus 3",
        "report nowhere",
    ],
)
def test_a_process_says_no_more_than_the_sentence(line, tmp_path):
    command = [sys.executable, "-m", "gpt2_lightning", *_arguments(line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment(tmp_path))
    lines = done.stderr.splitlines()
    assert done.returncode == len(lines), lines  # 1, or 2 with a line of usage
    assert ": error: " in lines[-1]
    if "--json" in command:
        assert done.stdout == ""


@pytest.mark.usefixtures("copied")
@posix
@slow
def test_a_reader_that_goes_away_is_no_error(tmp_path):
    generate = [sys.executable, "-m", "gpt2_lightning", *_arguments("GENERATE --num_samples 1000")]
    with subprocess.Popen(
        generate, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(tmp_path)
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.usefixtures("copied")
@slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
@pytest.mark.parametrize("line", ["PLAN", "GENERATE", "SCORE --examples rows.jsonl"])
def test_what_cannot_be_printed_is_told(line, tmp_path):
    command = [sys.executable, "-m", "gpt2_lightning", *_arguments(line)]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=_environment(tmp_path))
    assert done.returncode != 0
    assert "the disk is full (No space left on device): make room" in done.stderr.splitlines()[-1], done.stderr


# -- a hub that refuses, and none at all -------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Answers each request with the status that its repository's name tells."""

    statuses: ClassVar = {"locked": 403, "gone": 404, "banned": 451, "broken": 500, "busy": 429, "hellaswag": 451}
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = next((status for name, status in self.statuses.items() if name in self.path), 404)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_POST = do_HEAD = do_GET


LATER, LOGIN = "run the same command again later", "log in with `hf auth login`"
OF_THE_HUB = [
    ("refused", "prepare --out out --source org/locked", 1, "does not give org/locked (403", LOGIN),
    ("refused", "prepare --out out --source org/gone", 1, "has no dataset org/gone", "correct --source, or log in"),
    ("refused", "prepare --out out --source org/banned", 1, "does not give org/banned (Client error '451", LOGIN),
    ("refused", "prepare --out out --source org/broken", 1, "does not give org/broken (Server error '500", LATER),
    ("refused", "prepare --out out --source org/busy", 1, "does not give org/busy (429", LATER),
    ("refused", "generate org/locked --prompt x", 1, "org/locked is no path here", "403", LOGIN),
    ("refused", "generate org/gone --prompt x", 1, "org/gone is no path here", "404", "check the name"),
    ("refused", "export org/banned out", 1, "org/banned is no path here", "451", LOGIN),
    (
        "refused",
        "hellaswag org/broken --json --examples rows.jsonl",
        1,
        "org/broken is no path",
        "500",
        "check the name",
    ),
    ("refused", "SCORE", 0, "Rowan/hellaswag cannot be reached", "give the path of hellaswag_val.jsonl"),
    ("no network", "prepare --out out --source org/name", 1, "cannot be reached for org/name", "check the network"),
    ("no network", "generate gpt2 --prompt x", 1, "gpt2 is no path here", "check the name and the connection"),
    ("no network", "SCORE", 0, "Rowan/hellaswag cannot be reached", "give the path of hellaswag_val.jsonl"),
]


@pytest.fixture(scope="module")
def answers(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[Any]]:
    """(which hub, command line) → exit code, standard output and error of that command, all of a hub in one process."""
    program = """
import contextlib, io, json, sys
from gpt2_lightning.__main__ import main
for args in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(args)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = {}
    for hub, port in (("refused", server.server_port), ("no network", 9)):
        folder = tmp_path_factory.mktemp("hub")
        shutil.copytree(made, folder, dirs_exist_ok=True)
        lines = [line for which, line, *_ in OF_THE_HUB if which == hub]
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=json.dumps([_arguments(line) for line in lines]),
            capture_output=True,
            text=True,
            cwd=folder,
            env=_environment(folder / "home", HF_ENDPOINT=f"http://127.0.0.1:{port}", HF_HUB_OFFLINE="0"),
        )
        assert done.returncode == 0, done.stderr
        found |= {(hub, line): json.loads(told) for line, told in zip(lines, done.stdout.splitlines(), strict=True)}
    server.shutdown()
    server.server_close()
    return found


@slow
@pytest.mark.parametrize(
    ("hub", "line", "code", "parts"),
    [pytest.param(hub, line, code, parts, id=f"{hub}: {line}") for hub, line, code, *parts in OF_THE_HUB],
)
def test_a_hub_that_refuses_is_one_sentence_with_its_mend(hub, line, code, parts, answers):
    ended, out, err = answers[hub, line]
    assert ended == code, err
    (sentence,) = err.splitlines()
    for part in parts:
        assert part in sentence
    if code and "--json" in _arguments(line):
        assert out == ""
