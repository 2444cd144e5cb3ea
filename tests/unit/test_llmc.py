"""llm.c's checkpoint format, against a reader and a writer that follow its description and share no code of ours."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gpt2_lightning import GPT, GPTConfig, load
from gpt2_lightning.checkpoints.export import export
from gpt2_lightning.errors import UserError

V, T, L, H, C = 211, 24, 3, 2, 10  # vocabulary, context, layers, heads, channels
PADDED = 256  # 211 rounded up to a multiple of 128

# llm.c's ParameterTensors, in its order: name and shape there, and what GPT-2 calls it
FIELDS = [
    ("wte", (PADDED, C), "wte.weight"),
    ("wpe", (T, C), "wpe.weight"),
    ("ln1w", (L, C), "h.{}.ln_1.weight"),
    ("ln1b", (L, C), "h.{}.ln_1.bias"),
    ("qkvw", (L, 3 * C, C), "h.{}.attn.c_attn.weight"),
    ("qkvb", (L, 3 * C), "h.{}.attn.c_attn.bias"),
    ("attprojw", (L, C, C), "h.{}.attn.c_proj.weight"),
    ("attprojb", (L, C), "h.{}.attn.c_proj.bias"),
    ("ln2w", (L, C), "h.{}.ln_2.weight"),
    ("ln2b", (L, C), "h.{}.ln_2.bias"),
    ("fcw", (L, 4 * C, C), "h.{}.mlp.c_fc.weight"),
    ("fcb", (L, 4 * C), "h.{}.mlp.c_fc.bias"),
    ("fcprojw", (L, C, 4 * C), "h.{}.mlp.c_proj.weight"),
    ("fcprojb", (L, C), "h.{}.mlp.c_proj.bias"),
    ("lnfw", (C,), "ln_f.weight"),
    ("lnfb", (C,), "ln_f.bias"),
]


def read_fields(path: Path, dtype: str) -> tuple[tuple[int, ...], dict[str, NDArray[np.float32]]]:
    """Header and fields of a file; bfloat16 is the upper half of a float32."""
    raw = path.read_bytes()
    header = struct.unpack("<256i", raw[:1024])
    if dtype == "fp32":
        values = np.frombuffer(raw[1024:], "<f4")
    else:
        values = (np.frombuffer(raw[1024:], "<u2").astype(np.uint32) << 16).view(np.float32)
    fields, start = {}, 0
    for name, shape, _ in FIELDS:
        size = int(np.prod(shape))
        fields[name] = values[start : start + size].reshape(shape)
        start += size
    assert start == len(values)
    return header, fields


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=L, n_head=H, n_embd=C)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture
def checkpoint(model: GPT, tmp_path: Path) -> Path:
    shape = {"block_size": T, "vocab_size": V, "n_layer": L, "n_head": H, "n_embd": C}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"global_step": 1, "state_dict": state, "hyper_parameters": {"config": shape}}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize(("dtype", "version"), [("fp32", 3), ("bf16", 5)])
def test_export_agrees_field_by_field(model: GPT, checkpoint: Path, dtype: str, version: int) -> None:
    export(checkpoint, checkpoint.with_name("model.bin"), "llmc", dtype)  # type: ignore[arg-type]
    header, fields = read_fields(checkpoint.with_name("model.bin"), dtype)
    assert header == (20240326, version, T, V, L, H, C, PADDED) + (0,) * 248
    for name, shape, ours in FIELDS:
        layers = [model.transformer.get_parameter(ours.format(i)).detach() for i in range(L if "{}" in ours else 1)]
        expected = torch.stack(layers) if len(shape) > len(layers[0].shape) else layers[0]
        expected = expected if dtype == "fp32" else expected.bfloat16().float()
        rows = V if name == "wte" else shape[0]
        assert np.array_equal(fields[name][:rows], expected.numpy()), name
    assert not fields["wte"][V:].any()


def test_a_file_written_from_the_description_gives_our_logits(model: GPT, tmp_path: Path) -> None:
    with (tmp_path / "model.bin").open("wb") as file:
        file.write(struct.pack("<256i", 20240326, 3, T, V, L, H, C, PADDED, *[0] * 248))
        for name, _, ours in FIELDS:
            for i in range(L if "{}" in ours else 1):
                tensor = model.transformer.get_parameter(ours.format(i)).detach().numpy()
                file.write(np.pad(tensor, ((0, PADDED - V), (0, 0))).tobytes() if name == "wte" else tensor.tobytes())
    ours = load(tmp_path / "model.bin")
    assert ours.config == model.config  # without the file's padding
    idx = torch.randint(0, V, (2, T))
    with torch.no_grad():
        assert torch.equal(ours(idx), model(idx))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exporting_an_export_writes_the_same_bytes(model: GPT, checkpoint: Path, dtype: str) -> None:
    out = checkpoint.with_name("model.bin")
    export(checkpoint, out, "llmc", dtype)  # type: ignore[arg-type]
    export(out, checkpoint.with_name("again.bin"), "llmc", dtype)  # type: ignore[arg-type]
    assert out.read_bytes() == checkpoint.with_name("again.bin").read_bytes()
    assert not list(checkpoint.parent.glob(".*")), "no temporary file is left"


def test_the_padding_of_our_vocabulary_is_replaced_by_zeros(tmp_path: Path) -> None:
    model = GPT(GPTConfig(block_size=2, vocab_size=50304, n_layer=1, n_head=1, n_embd=2))
    shape = {"block_size": 2, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 2}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": shape}, "global_step": 0}, tmp_path / "a.ckpt")
    export(tmp_path / "a.ckpt", tmp_path / "model.bin", "llmc")
    raw = (tmp_path / "model.bin").read_bytes()
    assert struct.unpack("<8i", raw[:32]) == (20240326, 3, 2, 50257, 1, 1, 2, 50304)
    wte = np.frombuffer(raw[1024:], "<f4")[: 50304 * 2].reshape(50304, 2)
    assert np.array_equal(wte[:50257], model.lm_head.weight[:50257].detach().numpy())
    assert not wte[50257:].any()
    assert load(tmp_path / "model.bin").config.vocab_size == 50257


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:1000], "model.bin is truncated: it ends inside the header"),
        (lambda raw: raw[:-4], "model.bin is damaged or truncated"),
        (lambda raw: raw + b"more", "model.bin is damaged or truncated"),
        (lambda raw: raw[:16] + struct.pack("<i", 10**9) + raw[20:], "model.bin is damaged or truncated"),
        (lambda raw: raw[:4] + struct.pack("<i", 1) + raw[8:], "version 1: versions 3 and 5"),
    ],
)
def test_a_damaged_file_is_refused(checkpoint: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = checkpoint.with_name("model.bin")
    export(checkpoint, path, "llmc")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        load(path)


def test_export_replaces_only_an_llmc_checkpoint(checkpoint: Path) -> None:
    out = checkpoint.with_name("model.bin")
    export(checkpoint, out, "llmc", "bf16")
    export(checkpoint, out, "llmc", "fp32")
    assert read_fields(out, "fp32")[0][1] == 3
    before = checkpoint.read_bytes()
    for existing in (checkpoint, checkpoint.parent):
        with pytest.raises(UserError, match=r"exists and is not an llm\.c checkpoint"):
            export(checkpoint, existing, "llmc")
    assert checkpoint.read_bytes() == before
