"""``gpt2 fit`` gives the curves of build-nanogpt's loop, and of one written here, on the same weights and tokens."""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_lightning.__main__ import main
from gpt2_lightning.checkpoints.hf import from_hf

GOLDEN = Path(__file__).parents[1] / "data" / "golden_fp32"


def test_fit_gives_build_nanogpts_curve(tmp_path, write_recipe, make_shards, read_scalars):
    curve = json.loads((GOLDEN / "curve.json").read_text())
    root = make_shards(train=np.load(GOLDEN / "tokens_train.npy"), val=np.load(GOLDEN / "tokens_val.npy"))
    weights = {f"model.{name}": torch.from_numpy(value) for name, value in np.load(GOLDEN / "init.npz").items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": curve["config"]}}, tmp_path / "init.ckpt")
    micro_tokens = curve["micro_batch_size"] * curve["config"]["block_size"]
    recipe = write_recipe(
        root,
        trainer={"max_steps": curve["max_steps"], "gradient_clip_val": curve["clip"]},
        model={
            "config": None,
            "init_from": str(tmp_path / "init.ckpt"),
            "optimizer": {
                "class_path": "gpt2_lightning.optim.AdamW",
                "init_args": {k: curve[v] for k, v in {"lr": "max_lr", "betas": "betas", "eps": "eps"}.items()}
                | {"weight_decay": curve["weight_decay"]},
            },
            "lr_scheduler": {
                "class_path": "gpt2_lightning.schedule.WarmupCosine",
                "init_args": {"warmup_steps": curve["warmup_steps"], "min_lr": curve["min_lr"]},
            },
        },
        data={
            "total_batch_tokens": micro_tokens * curve["accumulate_grad_batches"],
            "micro_batch_size": curve["micro_batch_size"],
        },
        validation={"every_n_steps": 20, "tokens": curve["val_batches"] * micro_tokens},
    )

    assert main(["fit", "--config", str(recipe)]) == 0

    logged = read_scalars(tmp_path / "run")
    steps = [point["step"] for point in curve["train"]]
    assert list(logged["train/loss"]) == steps == list(range(60))
    for tag, key, tolerance in (("train/loss", "loss", 1e-6), ("train/grad_norm", "grad_norm", 1e-5)):
        expected = [point[key] for point in curve["train"]]
        np.testing.assert_allclose(list(logged[tag].values()), expected, rtol=tolerance, err_msg=tag)
    # TensorBoard stores float32
    assert list(logged["train/lr"].values()) == [float(np.float32(point["lr"])) for point in curve["train"]]
    assert list(logged["val/loss"]) == [0, 20, 40, 60]
    for step, loss in curve["val"][:3]:  # the reference validates before its last step, we after it
        assert logged["val/loss"][step] == pytest.approx(loss, rel=1e-6)


def _plain_loop(model, train, val, sizes, T, lr, clip, decay, betas, warmup, min_lr, validate_every):
    """Each step's (loss, norm, lr), and the validation losses, of transformers' GPT-2 with one batch per step."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n.endswith("bias") or ".ln_" in n], "weight_decay": 0.0},
        {"params": [p for n, p in named.items() if not (n.endswith("bias") or ".ln_" in n)], "weight_decay": decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8)

    def loss_of(sequences):
        ids = torch.tensor(np.stack(sequences).astype(np.int64))
        return F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())

    def validation():
        with torch.no_grad():
            return loss_of([val[i * T : i * T + T + 1] for i in range((len(val) - 1) // T)]).item()

    n_sequences, number, points, validations = (len(train) - 1) // T, 0, [], {}
    for step, tokens in enumerate(sizes):
        if step % validate_every == 0:
            validations[step] = validation()
        starts = [(number + i) % n_sequences * T for i in range(tokens // T)]
        number += tokens // T
        loss = loss_of([train[start : start + T + 1] for start in starts])
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in named.values()))
        if clip and norm > clip:
            for p in named.values():
                p.grad *= clip / norm
        ratio = (step - warmup) / (len(sizes) - warmup)
        cosine = min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (lr - min_lr)
        rate = lr * (step + 1) / warmup if step < warmup else cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        points.append((loss.item(), norm, rate))
    return points, validations | {len(sizes): validation()}


EXAMPLE = itertools.count()


@settings(max_examples=6, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_run_equals_a_plain_loop(data, tmp_path, write_recipe, make_shards, read_scalars):
    """For any shape, micro-batch, accumulation, batch-size schedule, clipping and intervals."""
    draw, name = data.draw, f"example{next(EXAMPLE)}"
    T, V, B, accumulate = (draw(st.integers(*limits)) for limits in ((1, 12), (5, 60), (1, 3), (1, 3)))
    layers, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    config = {"block_size": T, "vocab_size": V, "n_layer": layers, "n_head": heads, "n_embd": 4 * heads}
    start, doublings, steps = B * accumulate * T, draw(st.integers(0, 2)), draw(st.integers(2, 6))
    total, warmup = start << doublings, draw(st.integers(0, steps - 1))
    ramp = draw(st.integers(1, 4 * total))
    lr, clip = draw(st.floats(1e-3, 2e-2)), draw(st.sampled_from([None, 0, 0.05, 0.5, 100.0]))
    decay, betas = draw(st.floats(0, 1)), (draw(st.floats(0, 0.95)), draw(st.floats(0.5, 0.99)))
    min_lr = lr * draw(st.floats(0, 1))
    validate_every, log_every = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    train, val = (rng.integers(0, V, draw(st.integers(3 * T, 100)) + 1).astype(np.uint16) for _ in range(2))

    torch.manual_seed(draw(st.integers(0, 99)))
    shape = {"n_positions": T, "vocab_size": V, "n_layer": layers, "n_head": heads, "n_embd": 4 * heads}
    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **no_dropout, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    weights = {f"model.{key}": value.clone() for key, value in from_hf(model.state_dict()).items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": config}}, tmp_path / "init.ckpt")
    recipe = write_recipe(
        make_shards(train=train, val=val, name=f"{name}-data"),
        name=name,
        trainer={"max_steps": steps, "gradient_clip_val": clip, "log_every_n_steps": log_every},
        model={
            "config": None,
            "init_from": str(tmp_path / "init.ckpt"),
            "optimizer": {
                "class_path": draw(st.sampled_from(["gpt2_lightning.optim.AdamW", "torch.optim.AdamW"])),
                "init_args": {"lr": lr, "betas": list(betas), "eps": 1e-8, "weight_decay": decay},
            },
            "lr_scheduler": {
                "class_path": "gpt2_lightning.schedule.WarmupCosine",
                "init_args": {"warmup_steps": warmup, "min_lr": min_lr},
            },
            "chunked_loss": draw(st.booleans()),
            "activation_checkpointing": draw(st.booleans()),
        },
        data={
            "total_batch_tokens": total,
            "micro_batch_size": B << doublings,
            "batch_size_schedule": {"start_tokens": start, "ramp_tokens": ramp} if doublings else None,
        },
        validation={"every_n_steps": validate_every, "tokens": 10**6},
        run_dir=str(tmp_path / name),
    )
    sizes: list[int] = []
    for _ in range(steps):
        ramped = start + Fraction(
            (total - start) * sum(sizes), ramp
        )  # a line from `start` at 0 tokens to `total` at `ramp`
        sizes.append(max(start << k for k in range(doublings + 1) if k == 0 or ramped >= start << k))
    points, validations = _plain_loop(
        model, train, val, sizes, T, lr, clip, decay, betas, warmup, min_lr, validate_every
    )

    assert main(["fit", "--config", str(recipe)]) == 0

    logged = read_scalars(tmp_path / name)
    due = [s for s in range(steps) if s % log_every == 0 or s == steps - 1]
    assert list(logged["train/tokens"].items()) == [(s, sum(sizes[: s + 1])) for s in due]
    for tag, column, tolerance in (("train/loss", 0, 1e-5), ("train/grad_norm", 1, 1e-4), ("train/lr", 2, 1e-6)):
        assert list(logged[tag]) == due
        expected = [points[s][column] for s in due]
        np.testing.assert_allclose(list(logged[tag].values()), expected, rtol=tolerance, err_msg=tag)
    assert list(logged["val/loss"]) == sorted(validations)
    for step, loss in validations.items():
        assert logged["val/loss"][step] == pytest.approx(loss, rel=1e-5)
