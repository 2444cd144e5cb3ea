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
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
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


@pytest.fixture
def tiny_cpu_flags(make_shards, tmp_path) -> dict[str, object]:
    """Flags that let any recipe run here: tiny weights, tiny shards, one CPU."""
    torch.manual_seed(0)
    weights = {f"model.{name}": p for name, p in GPT(GPTConfig(**TINY)).state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"config": TINY}}, tmp_path / "tiny.ckpt")
    return {
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.precision": "32-true",
        "model.config": "null",
        "model.init_from": tmp_path / "tiny.ckpt",
        "data.root": make_shards(),
        "data.source": "null",
    }


def run(command: str, recipe: str, flags: dict[str, object]) -> None:
    flag_args = [f"--{name}={value}" for name, value in flags.items()]
    assert main([command, "--config", str(CONFIGS / f"{recipe}.yaml"), *flag_args]) == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_on_one_screen_and_opens_with_its_command_and_expected_result(recipe):
    command = "validate" if recipe == "eval_gpt2" else "fit"
    text = (CONFIGS / f"{recipe}.yaml").read_text()
    assert f" {command} --config configs/{recipe}.yaml" in text.splitlines()[0]
    assert re.search(r"^# Expected: ", text, re.MULTILINE)
    assert len(text.splitlines()) < 40
    assert f"[`{recipe}`]({recipe}.yaml)" in (CONFIGS / "README.md").read_text()


@pytest.mark.parametrize("recipe", PARAMETERS)
def test_the_size_and_memory_that_a_recipe_states_are_what_plan_calculates(recipe, capsys):
    assert main(["plan", "--config", str(CONFIGS / f"{recipe}.yaml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["all"] == PARAMETERS[recipe]
    stated = re.search(r"(\d+) GiB per GPU", (CONFIGS / f"{recipe}.yaml").read_text())
    if recipe != "quickstart":
        assert round(plan["memory_bytes"]["sum"] / 2**30) == int(stated[1])


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "eval_gpt2"])
def test_a_recipe_trains_with_its_own_optimizer_and_schedule(recipe, tiny_cpu_flags, read_scalars, monkeypatch):
    settings = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    flags = tiny_cpu_flags | {"model.compile": "false", "trainer.max_steps": 2, "run_dir": "run"}
    flags |= {"data.micro_batch_size": 2, "data.total_batch_tokens": 64}
    if "batch_size_schedule" in settings["data"]:
        flags |= {"data.micro_batch_size": 16, "data.total_batch_tokens": 512}
        flags |= {"data.batch_size_schedule.start_tokens": 32}
    configured = []
    configure = GPTModule.configure_optimizers
    monkeypatch.setattr(GPTModule, "configure_optimizers", lambda m: configured.append(configure(m)) or configured[-1])
    run("fit", recipe, flags)
    model = {"optimizer": ADAMW, "lr_scheduler": COSINE} | settings.get("model", {})
    made = {"optimizer": configured[0]["optimizer"], "lr_scheduler": configured[0]["lr_scheduler"]["scheduler"]}
    for section, instance in made.items():
        assert f"{type(instance).__module__}.{type(instance).__qualname__}" == model[section]["class_path"]
    logged = read_scalars(Path("run"))
    assert list(logged["train/loss"]) == [0, 1]
    assert np.isfinite(list(logged["train/loss"].values())).all()
    peak = model["optimizer"]["init_args"]["lr"]
    warmup_steps = model["lr_scheduler"]["init_args"]["warmup_steps"]
    rates = [np.float32(peak * step / warmup_steps) for step in (1, 2)]  # TensorBoard stores float32
    np.testing.assert_allclose(list(logged["train/lr"].values()), rates, rtol=1e-6)


def test_the_evaluation_recipe_prints_its_expected_figures(tiny_cpu_flags, capsys):
    run("validate", "eval_gpt2", tiny_cpu_flags)
    assert "val/loss: expected 3.2924, found 4." in capsys.readouterr().out
