"""Each shipped recipe: short, true to its first line, of the size that it names, and it trains as it stands."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from gpt2_lightning.__main__ import main
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.module import GPTModule

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TINY = {"block_size": 16, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}

DEFAULTS = {
    "optimizer": {"class_path": "gpt2_lightning.optim.AdamW", "init_args": {"lr": 6e-4}},
    "lr_scheduler": {"class_path": "gpt2_lightning.schedule.WarmupCosine", "init_args": {"warmup_steps": 715}},
}

PARAMETERS = {  # with 50,304 rows
    "quickstart": 3_427_712,
    "gpt2_124m": 124_475_904,
    "gpt2_124m_muon": 124_475_904,
    "gpt2_350m": 354_871_296,
    "gpt2_774m": 774_090_240,
    "gpt2_1558m": 1_557_686_400,
    "gpt3_125m": 125_262_336,
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_short_and_opens_with_its_command(recipe, capsys):
    command = "validate" if recipe.stem == "eval_gpt2" else "fit"
    lines = recipe.read_text().splitlines()
    assert f" {command} --config configs/{recipe.name}" in lines[0]
    assert len(lines) < 50
    assert main([command, "--config", str(recipe), "--print_config"]) == 0
    assert "max_steps:" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_its_model_has_the_size_that_it_names(recipe):
    model = yaml.safe_load(recipe.read_text()).get("model", {})
    if "init_from" in model:
        assert recipe.stem in ("eval_gpt2", "finetune")  # the weights' own
        return
    shape = model.get("config", {})
    with torch.device("meta"):
        assert GPT(GPTConfig(**shape)).num_parameters() == PARAMETERS[recipe.stem]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_it_trains_with_its_own_optimizer_and_schedule(
    recipe, make_shards, read_scalars, tmp_path, capsys, monkeypatch
):
    settings = yaml.safe_load(recipe.read_text())
    torch.manual_seed(0)
    weights = {f"model.{name}": p for name, p in GPT(GPTConfig(**TINY)).state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": TINY}}, tmp_path / "tiny.ckpt")
    flags = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    flags += ["--data.root", str(make_shards()), "--data.source", "null", "--data.micro_batch_size", "2"]
    model = DEFAULTS | settings.get("model", {})
    if "init_from" in model:
        flags += ["--model.init_from", str(tmp_path / "tiny.ckpt")]
    else:
        flags += ["--model.config", str(TINY)]
    if recipe.stem == "eval_gpt2":
        assert main(["validate", "--config", str(recipe), *flags]) == 0
        assert "val/loss: expected 3.2924, found 4." in capsys.readouterr().out
        return
    optimizers = []
    configure = GPTModule.configure_optimizers
    monkeypatch.setattr(GPTModule, "configure_optimizers", lambda m: optimizers.append(configure(m)) or optimizers[-1])
    tokens = 32 * 16 if settings["data"].get("batch_size_schedule") else 64
    flags += ["--data.total_batch_tokens", str(tokens), "--trainer.precision", "32-true", "--model.compile", "false"]
    if settings["data"].get("batch_size_schedule"):
        flags += ["--data.batch_size_schedule.start_tokens", "32", "--data.micro_batch_size", "16"]
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "2", "--run_dir", "run", *flags]) == 0
    logged = read_scalars(Path("run"))
    assert list(logged["train/loss"]) == [0, 1]
    assert np.isfinite(list(logged["train/loss"].values())).all()
    optimizer, scheduler = optimizers[0]["optimizer"], optimizers[0]["lr_scheduler"]["scheduler"]
    for made, section in ((optimizer, "optimizer"), (scheduler, "lr_scheduler")):
        typed = model[section]
        assert f"{type(made).__module__}.{type(made).__qualname__}" == typed["class_path"]
    peak = model["optimizer"]["init_args"]["lr"]
    warm_up = model["lr_scheduler"]["init_args"]["warmup_steps"]
    rates = [np.float32(peak * step / warm_up) for step in (1, 2)]  # TensorBoard stores float32
    np.testing.assert_allclose(list(logged["train/lr"].values()), rates, rtol=1e-6)


@pytest.mark.parametrize("name", ["gpt2_124m", "gpt2_124m_muon", "gpt2_350m", "gpt2_774m", "gpt2_1558m", "gpt3_125m"])
def test_what_a_recipe_says_it_takes_of_a_card_is_what_plan_says(name, capsys):
    recipe = RECIPES[0].parent / f"{name}.yaml"
    stated = re.search(r"(\d+) GiB of each", recipe.read_text())
    assert main(["plan", "--config", str(recipe), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["memory_bytes"]["sum"] / 2**30
    assert planned < 0.9 * 40 if stated is None else round(planned) == int(stated[1])
