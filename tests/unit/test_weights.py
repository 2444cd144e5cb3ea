"""Weights: every format loads to the same logits, exports open in transformers, bad files raise a clear error."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Model, GPT2Tokenizer

from gpt2_lightning import GPT, GPTConfig, load
from gpt2_lightning.checkpoints.export import export
from gpt2_lightning.checkpoints.hf import from_hf, to_hf
from gpt2_lightning.errors import UserError
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer

SHAPE = {"block_size": 24, "vocab_size": 211, "n_layer": 2, "n_head": 3, "n_embd": 15}


def random_hf(**shape: int) -> GPT2LMHeadModel:
    """HF's own network with large random weights, biases and LayerNorms too, so that a mix-up changes the logits."""
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **{"n_positions": 24, "vocab_size": 211, "n_layer": 2} | shape)
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def random_gpt(**changes: int) -> GPT:
    torch.manual_seed(2)
    model = GPT(GPTConfig(**SHAPE | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model


def write_checkpoint(model: GPT, path: Path, **changes: Any) -> Path:
    """A checkpoint as Lightning writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    shape = {name: getattr(model.config, name) for name in SHAPE}
    torch.save({"global_step": 70, "state_dict": state, "hyper_parameters": {"config": shape}} | changes, path)
    return path


def ids_for(config: GPTConfig, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, min(config.vocab_size, VOCAB_SIZE), (batch, config.block_size), generator=generator)


def logits(model: Any, idx: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(idx)
    return out if isinstance(out, Tensor) else out.logits


def hf_shape(block_size: int, vocab_size: int, n_layer: int, n_head: int, head_size: int) -> dict[str, int]:
    shape = {"n_positions": block_size, "vocab_size": vocab_size, "n_layer": n_layer, "n_head": n_head}
    return shape | {"n_embd": n_head * head_size}


HF_SHAPES = st.builds(
    hf_shape, st.integers(1, 40), st.integers(2, 300), st.integers(1, 4), st.integers(1, 5), st.integers(1, 9)
)


@settings(max_examples=25)
@given(shape=HF_SHAPES, scale=st.floats(0.01, 5), B=st.integers(1, 3), data=st.data())
@example(shape=hf_shape(17, 1009, 2, 5, 7), scale=0.2, B=3, data=None)
@example(shape=hf_shape(31, 101, 3, 3, 13), scale=0.2, B=3, data=None)
def test_forward_equals_transformers_at_any_shape(shape: dict[str, int], scale: float, B: int, data: Any) -> None:
    theirs = random_hf(**shape)
    ours = GPT(GPTConfig(shape["n_positions"], *list(shape.values())[1:])).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * scale)
    assert not ours.load_state_dict(from_hf(theirs.state_dict()), strict=False).unexpected_keys
    T = data.draw(st.integers(1, shape["n_positions"])) if data else shape["n_positions"]
    idx = torch.randint(0, shape["vocab_size"], (B, T), generator=torch.Generator().manual_seed(3))
    expected = logits(theirs, idx)
    assert (logits(ours, idx) - expected).abs().max() < 1e-4 * expected.abs().max()  # as promised


@pytest.mark.parametrize(("n_layer", "n_head"), [(12, 12), (24, 16), (36, 20), (48, 25)])
def test_forward_equals_transformers_at_the_structure_of_the_four_sizes(
    tmp_path: Path, n_layer: int, n_head: int
) -> None:
    theirs = random_hf(n_layer=n_layer, n_head=n_head, n_embd=4 * n_head)
    theirs.save_pretrained(tmp_path)
    ours = load(str(tmp_path))
    idx = ids_for(ours.config)
    expected = logits(theirs, idx)
    assert (logits(ours, idx) - expected).abs().max() < 1e-4 * expected.abs().max()


@settings(max_examples=8)
@given(shape=HF_SHAPES, format=st.sampled_from(["hf", "llmc"]), dtype=st.sampled_from(["fp32", "bf16"]))
@example(shape=hf_shape(3, 128, 1, 1, 2), format="llmc", dtype="fp32")
def test_an_export_loads_bit_identical_weights_at_any_shape(
    tmp_path_factory: pytest.TempPathFactory, shape: dict[str, int], format: Any, dtype: Any
) -> None:
    tmp = tmp_path_factory.mktemp("export")
    names = dict(zip(("block_size", "vocab_size", "n_layer", "n_head", "n_embd"), shape.values(), strict=True))
    model = random_gpt(**names)
    out = tmp / ("out" if format == "hf" else "out.bin")
    export(write_checkpoint(model, tmp / "a.ckpt"), out, format, dtype)
    back = load(out)
    assert back.config == model.config
    for name, p in model.named_parameters():
        assert torch.equal(back.get_parameter(name), p if dtype == "fp32" else p.bfloat16().float()), name
    idx = ids_for(model.config)
    if format == "hf":
        assert AutoModelForCausalLM.from_pretrained(out).dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        expected = logits(back, idx)
        assert (logits(theirs, idx) - expected).abs().max() < 1e-4 * expected.abs().max()
    export(out, tmp / "again.bin", "llmc")
    shutil.rmtree(out) if format == "hf" else out.unlink()
    assert torch.equal(logits(load(tmp / "again.bin"), idx), logits(back, idx))


def test_hf_to_ours_to_hf_is_the_identity(tmp_path: Path) -> None:
    theirs = random_hf(n_head=3, n_embd=15)
    theirs.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "theirs", tmp_path / "ours")
    before, after = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    assert before.keys() == after.keys()
    assert len(after) == 4 + 2 * 12  # wte, wpe, ln_f twice; 12 in each block; no head
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_key_maps_are_inverse_with_and_without_prefix_head_and_mask_buffers() -> None:
    full = random_hf(n_head=3, n_embd=15).state_dict()
    bare = {name.removeprefix("transformer."): t for name, t in full.items() if name != "lm_head.weight"}
    bare |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24) for i in range(2)}
    bare |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    for state in (full, bare):
        back = to_hf(from_hf(state))
        assert back.keys() == full.keys() - {"lm_head.weight"}
        assert all(torch.equal(back[name], full[name]) for name in back)
    assert from_hf(full)["transformer.h.0.attn.c_attn.weight"].shape == (45, 15)  # (out, in)


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "torch", "torch_sharded", "bare", "buffers", "head"])
def test_every_kind_of_model_folder_loads_to_the_same_logits(tmp_path: Path, kind: str) -> None:
    theirs = random_hf(n_head=3, n_embd=15)
    idx = ids_for(GPTConfig(**SHAPE))
    theirs.save_pretrained(tmp_path, max_shard_size="10KB" if kind == "sharded" else "1GB")
    state = {name: t.clone() for name, t in theirs.state_dict().items() if name != "lm_head.weight"}
    weights = tmp_path / "model.safetensors"
    if kind == "sharded":
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert not weights.exists()
    elif kind == "torch":
        weights.unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    elif kind == "torch_sharded":
        weights.unlink()
        for i in range(2):
            torch.save(dict(list(state.items())[i::2]), tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    elif kind == "bare":
        GPT2Model.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert "wte.weight" in load_file(weights)
    elif kind == "buffers":
        masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.bool) for i in range(2)}
        save_file(state | masks, weights)
    elif kind == "head":
        save_file(state | {"lm_head.weight": state["transformer.wte.weight"].clone()}, weights)
    assert (logits(load(tmp_path), idx) - logits(theirs, idx)).abs().max() < 1e-5


def test_a_padded_vocabulary_is_kept(tmp_path: Path) -> None:
    theirs = random_hf(vocab_size=50304, n_head=1, n_embd=4, n_layer=1)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.vocab_size == 50304
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)


@pytest.mark.parametrize("head", [True, False])
def test_a_checkpoint_loads_tied_in_float32_in_eval_mode(tmp_path: Path, head: bool) -> None:
    model = random_gpt()
    state = {f"model.{name}": t for name, t in model.state_dict().items() if head or name != "lm_head.weight"}
    path = write_checkpoint(model, tmp_path / "a.ckpt", state_dict=state | {"metric.total": torch.zeros(1)})
    torch.manual_seed(4)
    expected_draw = torch.rand(1)
    torch.manual_seed(4)
    ours = load(path)
    assert torch.equal(torch.rand(1), expected_draw), "load changed the global random state"
    assert ours.config == model.config
    assert ours.lm_head.weight is ours.transformer.get_parameter("wte.weight")
    assert not ours.training
    assert all(p.requires_grad and p.is_contiguous() for p in ours.parameters())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True))

    with path.open("r+b") as file:  # the model does not depend on the memory-mapped file
        file.write(bytes(path.stat().st_size))
    assert torch.equal(ours.lm_head.weight, model.lm_head.weight)

    write_checkpoint(model.bfloat16(), path)
    assert {p.dtype for p in load(path).parameters()} == {torch.float32}


def test_export_opens_in_transformers_with_the_same_logits_and_greedy_text(tmp_path: Path) -> None:
    model = random_gpt(vocab_size=50304, block_size=120)
    with torch.no_grad():
        model.lm_head.weight[VOCAB_SIZE:] = 9.0  # padding that must not be exported
    export(write_checkpoint(model, tmp_path / "a.ckpt"), tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs) is GPT2LMHeadModel
    assert theirs.config.vocab_size == theirs.lm_head.weight.size(0) == VOCAB_SIZE
    assert theirs.config.eos_token_id == END_OF_TEXT
    idx = ids_for(model.config)
    expected = logits(model, idx)[..., :VOCAB_SIZE]
    assert (logits(theirs, idx) - expected).abs().max() < 1e-5
    assert (logits(load(tmp_path / "out"), idx) - expected).abs().max() < 1e-5
    greedy = theirs.generate(idx[:1, :5], max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    ours = idx[:1, :5]
    for _ in range(40):
        ours = torch.cat([ours, logits(model, ours)[:, -1:, :VOCAB_SIZE].argmax(-1)], dim=1)
    assert greedy.tolist() == ours.tolist()


def test_exported_tokenizer_agrees_with_tiktoken(tmp_path: Path) -> None:
    export(write_checkpoint(random_gpt(vocab_size=VOCAB_SIZE), tmp_path / "a.ckpt"), tmp_path / "out")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), get_tokenizer()
    assert theirs("Hello world")["input_ids"] == [15496, 995]  # the example in transformers' documentation
    assert theirs("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]
    assert len(theirs) == VOCAB_SIZE
    rng = random.Random(0)
    alphabet = [
        *map(chr, range(32, 127)),
        *"\n\t '’…éßñĠ·漢字かな한글😀👩‍🚀\u00a0\u3000\u200d",
        "'ll",
        "  ",
        "don't",
        "123",
    ]
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(50)))
        tokens = ours.encode_ordinary(text)
        assert theirs(text)["input_ids"] == tokens
        assert theirs.decode(tokens, clean_up_tokenization_spaces=False) == text
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert merges[:3] == ["Ġ t", "Ġ a", "h e"]  # the first three of OpenAI's vocab.bpe
    assert len(merges) == 50_000
    assert type(theirs) is type(GPT2Tokenizer.from_pretrained(tmp_path / "out")) is GPT2Tokenizer


def test_a_small_vocabulary_is_exported_without_a_tokenizer(tmp_path: Path) -> None:
    export(write_checkpoint(random_gpt(), tmp_path / "a.ckpt"), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert load(tmp_path / "out").config.vocab_size == 211
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1, "the same mode for all"


def test_the_model_card_shows_the_metrics_in_the_checkpoint(tmp_path: Path) -> None:
    metrics = {"val/loss": 4.25, "train/tokens": 8960.0, "hellaswag/acc_norm": 0.25, "train/lr": 0.77}
    callbacks = {"HellaSwag": {"last_step": 70, "examples": "builtin, 48 examples"}}
    export(write_checkpoint(random_gpt(), tmp_path / "a.ckpt", metrics=metrics, callbacks=callbacks), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| optimizer steps | 70 |" in card
    assert "| val/loss | 4.2500 |" in card
    assert "| train/tokens | 8,960 |" in card
    assert "| hellaswag/acc_norm | 0.2500 (builtin, 48 examples) |" in card
    assert "0.77" not in card
    # 211·15 + 24·15 + 30, and in each of 2 blocks 12·15² + 13·15
    assert "| parameters | 9,345 |" in card


def test_a_checkpoint_with_weights_alone_is_exported(tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in random_gpt().state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": SHAPE}}, tmp_path / "weights.ckpt")
    export(tmp_path / "weights.ckpt", tmp_path / "out")
    assert torch.equal(load(tmp_path / "out").lm_head.weight, state["model.lm_head.weight"])


def test_export_replaces_an_earlier_export_and_leaves_other_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(write_checkpoint(random_gpt(vocab_size=VOCAB_SIZE), tmp_path / "a.ckpt"), out)
    (out / "notes.txt").write_text("mine")
    (out / ".partial").mkdir()  # from an export that was killed
    (out / ".partial" / "model.safetensors").write_text("half")
    export(write_checkpoint(random_gpt(n_layer=1), tmp_path / "a.ckpt"), out)
    assert load(out).config.n_layer == 1
    files = ["README.md", "config.json", "model.safetensors", "notes.txt"]  # no tokenizer: not GPT-2's vocabulary
    assert sorted(p.name for p in out.iterdir()) == files


def test_a_failed_export_leaves_the_earlier_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    export(write_checkpoint(random_gpt(), tmp_path / "a.ckpt"), out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def disk_full(state: object, path: Path, metadata: object) -> None:
        Path(path).write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr("gpt2_lightning.checkpoints.hf.save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        export(write_checkpoint(random_gpt(n_layer=1), tmp_path / "a.ckpt"), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_export_does_not_overwrite_foreign_files(tmp_path: Path) -> None:
    path = write_checkpoint(random_gpt(), tmp_path / "a.ckpt")
    theirs = tmp_path / "theirs"
    random_hf(n_head=3, n_embd=15).save_pretrained(theirs)
    before = {p.name: p.read_bytes() for p in theirs.iterdir()}
    with pytest.raises(UserError, match="not an earlier export"):
        export(path, theirs)
    assert {p.name: p.read_bytes() for p in theirs.iterdir()} == before
    with pytest.raises(NotADirectoryError):
        export(path, path)
    assert load(path).config.n_layer == 2


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"a\.ckpt does not exist"),
        (lambda path: cut(path, 5000), r"a\.ckpt is damaged or truncated"),
        (lambda path: path.write_text("hello"), r"a\.ckpt is neither a checkpoint of gpt2_lightning nor"),
        (
            lambda path: torch.save({"state_dict": {}, "epoch": 3}, path),
            r"a\.ckpt is not a checkpoint of",
        ),
        (
            lambda path: write_checkpoint(random_gpt(), path, hyper_parameters={"config": SHAPE | {"block_size": 25}}),
            r"a\.ckpt does not .* transformer\.wpe\.weight is \(24, 15\), expected \(25, 15\)",
        ),
        (
            lambda path: write_checkpoint(random_gpt(), path, hyper_parameters={"config": SHAPE | {"n_layer": 3}}),
            r"a\.ckpt does not .* transformer\.h\.2\.attn\.c_attn\.bias is missing",
        ),
    ],
)
def test_a_bad_checkpoint_is_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    path = write_checkpoint(random_gpt(), tmp_path / "a.ckpt")
    damage(path)
    with pytest.raises(UserError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "config.json", 20), r"config\.json is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights: expected model\.safetensors or"),
        (lambda folder: cut(folder / "model.safetensors", -100), r"model\.safetensors is damaged or truncated"),
        (lambda folder: change_config(folder, model_type="llama"), r"describes the architecture 'llama'"),
        (lambda folder: change_config(folder, activation_function="relu"), r"'relu': GPT-2 has 'gelu_new'"),
        (lambda folder: change_config(folder, n_embd=18), r"c_attn\.bias is \(45,\), expected \(54,\)"),
        (lambda folder: change_config(folder, vocab_size=212), r"wte\.weight is \(211, 15\), expected \(212, 15\)"),
        (lambda folder: add_weight(folder, "score.weight"), r"score\.weight .* expected no such weight"),
        (
            lambda folder: add_weight(folder, "lm_head.weight"),
            r"lm_head\.weight .* expected no such weight",
        ),
    ],
)
def test_a_bad_model_folder_is_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    random_hf(n_head=3, n_embd=15).save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add_weight(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(211, 15)}, path)


def test_a_missing_shard_of_weights_is_refused(tmp_path: Path) -> None:
    random_hf(n_head=3, n_embd=15).save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"the shape of transformer\..* is missing, .* incomplete"):
        load(tmp_path)


def test_load_imports_no_training_code() -> None:
    code = "import sys, gpt2_lightning.checkpoints.load; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "gpt2_lightning.model" in imported
    assert not {"lightning", "jsonargparse", "tensorboard", "gpt2_lightning.checkpoints.export"} & set(imported)


@pytest.mark.slow
def test_export_opens_in_a_process_that_has_no_network(tmp_path: Path) -> None:
    export(write_checkpoint(random_gpt(vocab_size=50304), tmp_path / "a.ckpt"), tmp_path / "out")
    code = """
import socket
def refuse(*args, **kwargs): raise AssertionError("a socket was opened")
socket.socket.connect = socket.getaddrinfo = refuse
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
ids = tokenizer("Hello world", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0).shape[1])
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "7"
