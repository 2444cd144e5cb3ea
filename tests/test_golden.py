"""``gpt2 fit`` gives the curve that build-nanogpt's own loop gave from the same weights and tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2_lightning.__main__ import main

GOLDEN = Path(__file__).parent / "data" / "golden_fp32"


def test_fit_reproduces_build_nanogpt(tmp_path, write_recipe, make_shards, read_scalars):
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
    for step, loss in curve["val"][:3]:  # the reference's last was taken before its last update, ours comes after it
        assert logged["val/loss"][step] == pytest.approx(loss, rel=1e-6)
