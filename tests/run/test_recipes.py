"""Each shipped recipe states its command and needs truly, and trains with its own optimizer and schedule."""

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

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
TINY = {"block_size": 16, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}
ADAMW = {"class_path": "gpt2_lightning.optim.AdamW", "init_args": {"lr": 6e-4}}
COSINE = {"class_path": "gpt2_lightning.schedule.WarmupCosine", "init_args": {"warmup_steps": 715}}

PARAMETERS = {  # with a vocabulary of 50,304
    "quickstart": 3_427_712,
    "gpt2_124m": 124_475_904,
    "gpt2_124m_muon": 124_475_904,
    "gpt2_350m": 354_871_296,
    "gpt2_774m": 774_090_240,
    "gpt2_1558m": 1_557_686_400,
    "gpt3_125m": 125_262_336,
}
OF_PUBLISHED_WEIGHTS = {"eval_gpt2", "finetune"}


@pytest.fixture
def on_a_cpu(make_shards) -> list[str]:
    """Flags that let any recipe run here: one CPU, a tiny model, tiny shards."""
    flags = {
        "trainer.accelerator": "cpu",
        "trainer.devices": "1",
        "trainer.strategy": "auto",
        "trainer.precision": "32-true",
        "data.root": str(make_shards()),
        "data.source": "null",
    }
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


@pytest.fixture
def tiny_weights(tmp_path) -> str:
    torch.manual_seed(0)
    weights = {f"model.{name}": p for name, p in GPT(GPTConfig(**TINY)).state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": TINY}}, tmp_path / "tiny.ckpt")
    return str(tmp_path / "tiny.ckpt")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_fits_on_one_screen_and_opens_with_its_command_and_expected_result(recipe, capsys):
    command = "validate" if recipe.stem == "eval_gpt2" else "fit"
    lines = recipe.read_text().splitlines()
    assert f" {command} --config configs/{recipe.name}" in lines[0]
    assert any(line.startswith("# Expected: ") for line in lines)
    assert len(lines) < 40
    assert main([command, "--config", str(recipe), "--print_config"]) == 0
    assert "max_steps:" in capsys.readouterr().out


def test_each_recipe_has_a_row_in_the_table():
    table = (CONFIGS / "README.md").read_text()
    assert {recipe.stem for recipe in RECIPES} == set(re.findall(r"\[`(\w+)`\]\(\1\.yaml\)", table))


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem not in OF_PUBLISHED_WEIGHTS], ids=lambda p: p.stem)
def test_a_model_has_the_parameters_that_its_name_states(recipe):
    model = yaml.safe_load(recipe.read_text()).get("model", {})
    with torch.device("meta"):
        assert GPT(GPTConfig(**model.get("config", {}))).num_parameters() == PARAMETERS[recipe.stem]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem != "eval_gpt2"], ids=lambda p: p.stem)
def test_a_recipe_trains_with_its_own_optimizer_and_schedule(
    recipe, on_a_cpu, tiny_weights, read_scalars, capsys, monkeypatch
):
    settings = yaml.safe_load(recipe.read_text())
    model = {"optimizer": ADAMW, "lr_scheduler": COSINE} | settings.get("model", {})
    shape = ["--model.init_from", tiny_weights] if "init_from" in model else ["--model.config", str(TINY)]
    size = ["--data.micro_batch_size", "2", "--data.total_batch_tokens", "64"]
    if "batch_size_schedule" in settings["data"]:
        size = ["--data.micro_batch_size", "16", "--data.total_batch_tokens", "512"]
        size += ["--data.batch_size_schedule.start_tokens", "32"]
    configured = []
    configure = GPTModule.configure_optimizers
    monkeypatch.setattr(GPTModule, "configure_optimizers", lambda m: configured.append(configure(m)) or configured[-1])
    flags = [*on_a_cpu, *shape, *size, "--model.compile", "false", "--trainer.max_steps", "2", "--run_dir", "run"]
    assert main(["fit", "--config", str(recipe), *flags]) == 0
    for section, made in (
        ("optimizer", configured[0]["optimizer"]),
        ("lr_scheduler", configured[0]["lr_scheduler"]["scheduler"]),
    ):
        assert f"{type(made).__module__}.{type(made).__qualname__}" == model[section]["class_path"]
    logged = read_scalars(Path("run"))
    assert list(logged["train/loss"]) == [0, 1]
    assert np.isfinite(list(logged["train/loss"].values())).all()
    peak = model["optimizer"]["init_args"]["lr"]
    warmup_steps = model["lr_scheduler"]["init_args"]["warmup_steps"]
    rates = [np.float32(peak * step / warmup_steps) for step in (1, 2)]  # TensorBoard stores float32
    np.testing.assert_allclose(list(logged["train/lr"].values()), rates, rtol=1e-6)


def test_the_evaluation_recipe_prints_its_expected_figures(on_a_cpu, tiny_weights, capsys):
    flags = [*on_a_cpu, "--model.init_from", tiny_weights]
    assert main(["validate", "--config", str(CONFIGS / "eval_gpt2.yaml"), *flags]) == 0
    assert "val/loss: expected 3.2924, found 4." in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(PARAMETERS.keys() - {"quickstart"}))
def test_the_memory_that_a_recipe_states_is_what_plan_calculates(name, capsys):
    recipe = CONFIGS / f"{name}.yaml"
    stated = re.search(r"(\d+) GiB per GPU", recipe.read_text())
    assert main(["plan", "--config", str(recipe), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["memory_bytes"]["sum"]
    assert round(planned / 2**30) == int(stated[1])
