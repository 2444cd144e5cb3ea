"""``gpt2 fit`` in one process: what a run leaves behind, and what its settings do."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

from gpt2_lightning import load
from gpt2_lightning.__main__ import main
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.model import GPTConfig
from gpt2_lightning.module import GPTModule

NAMES = {"train/loss", "train/grad_norm", "train/lr", "train/tokens", "train/tokens_per_sec", "val/loss"}
SCHEDULE = {
    "class_path": "gpt2_lightning.schedule.WarmupCosine",
    "init_args": {"warmup_steps": 2, "max_steps": 6, "min_lr": 3e-4},
}
CURVES = ("train/loss", "train/grad_norm", "val/loss")


@pytest.fixture
def fit(write_recipe, make_shards, read_scalars, tmp_path):
    """Runs ``gpt2 fit`` in a folder of its own on the shards that all runs of a test share; returns what it logged."""
    root = make_shards()

    def run(name="run", flags=(), **changes):
        recipe = write_recipe(root, name=name, run_dir=str(tmp_path / name), **changes)
        assert main(["fit", "--config", str(recipe), *flags]) == 0
        return read_scalars(tmp_path / name)

    return run


def assert_close(curves, reference, tags=CURVES):
    for tag in tags:
        assert list(curves[tag]) == list(reference[tag])
        np.testing.assert_allclose(list(curves[tag].values()), list(reference[tag].values()), rtol=1e-5, err_msg=tag)


def test_a_run_leaves_its_checkpoints_events_config_and_log(fit, tmp_path, capsys):
    logged = fit()
    run = tmp_path / "run"
    assert set(logged) == NAMES
    assert list(logged["train/loss"]) == list(range(6))  # step s at x = s, as build-nanogpt numbers them
    assert list(logged["val/loss"]) == [0, 3, 6]  # 0, N, 2N …, the last
    assert logged["train/tokens"][5] == 6 * 128
    assert logged["val/loss"][0] == pytest.approx(math.log(64), abs=0.05)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "best.ckpt", "last.ckpt", "step_000003.ckpt", "step_000006.ckpt"
    ]  # fmt: skip
    lines = (run / "log.txt").read_text().splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == [
        "0 val", "0 train", "1 train", "2 train", "3 val", "3 train", "4 train", "5 train", "6 val"
    ]  # fmt: skip
    assert float(lines[1].split()[-1]) == pytest.approx(logged["train/loss"][0], abs=1e-6)
    assert str(run / "checkpoints" / "last.ckpt") in capsys.readouterr().out

    # the saved config is a recipe: the same command with it finds the run complete
    before = (run / "log.txt").read_text()
    assert main(["fit", "--config", str(run / "config.yaml")]) == 0
    assert (run / "log.txt").read_text() == before


def test_a_checkpoint_holds_plain_types_under_hf_names_and_the_last_metrics(fit, tmp_path):
    logged = fit()
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    shape = {"block_size": 16, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}
    assert checkpoint["hyper_parameters"]["config"] == shape
    assert checkpoint["global_step"] == 6
    assert "model.transformer.h.1.attn.c_attn.weight" in checkpoint["state_dict"]
    assert all(name.startswith("model.") for name in checkpoint["state_dict"])
    assert checkpoint["metrics"].keys() == logged.keys()
    assert checkpoint["metrics"]["val/loss"] == pytest.approx(logged["val/loss"][6])
    assert checkpoint["metrics"]["train/loss"] == pytest.approx(logged["train/loss"][5])
    for name, value in load(path).state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][f"model.{name}"])
        assert torch.equal(value, GPTModule.load_from_checkpoint(path).model.state_dict()[name])


def test_a_plain_lightning_script_logs_the_same_curves(fit, make_shards, tmp_path):
    expected = fit(validation={"every_n_steps": 0})
    torch.manual_seed(1337)
    module = GPTModule(
        GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=16),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
    )
    data = TokenDataModule(root=str(tmp_path / "shards"), source=None, total_batch_tokens=128, micro_batch_size=4)
    trainer = Trainer(max_steps=6, accelerator="cpu", log_every_n_steps=1, logger=CSVLogger("."))
    trainer.fit(module, datamodule=data)
    lines = Path(trainer.log_dir, "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert list(losses) == list(range(6))  # once per step of two micro-batches
    assert losses[0] == pytest.approx(expected["train/loss"][0], rel=1e-6)
    assert [int(float(row["train/tokens"])) for row in rows if row["train/tokens"]] == [128 * s for s in range(1, 7)]
    (val_loss,) = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert trainer.validate(module, data, verbose=False)[0]["val/loss"] == pytest.approx(val_loss)


def test_the_same_tokens_give_the_same_curve_whatever_the_micro_batch(fit):
    curves = [fit(name=f"b{size}", data={"micro_batch_size": size}) for size in (8, 4, 2)]
    for other in curves[1:]:
        assert_close(other, curves[0])


@pytest.mark.parametrize(("optimizer", "workers"), [("AdamW", 0), ("AdamW", 2), ("Muon", 0)])
def test_a_resumed_run_equals_an_uninterrupted_run(optimizer, workers, fit, tmp_path):
    changes = {
        "model": {"lr_scheduler": SCHEDULE, "optimizer": {"class_path": f"gpt2_lightning.optim.{optimizer}"}},
        "data": {"order": "shuffled", "num_workers": workers},
    }
    whole = fit("whole", **changes)
    fit("cut", trainer={"max_steps": 3}, **changes)
    cut = fit("cut", **changes)
    for tag in NAMES - {"train/tokens_per_sec"}:
        assert cut[tag] == whole[tag], tag
    weights = [load(tmp_path / run / "checkpoints" / "last.ckpt").state_dict() for run in ("whole", "cut")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_and_plain_runs_can_resume_each_other(fit):
    curves, keys = [], []
    for name, first, second in (("plain", False, False), ("to_plain", True, False), ("to_compiled", False, True)):
        fit(name, trainer={"max_steps": 3}, model={"compile": first, "lr_scheduler": SCHEDULE})
        keys.append(list(torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True)["state_dict"]))
        curves.append(fit(name, model={"compile": second, "lr_scheduler": SCHEDULE}))
    assert keys[0] == keys[1] == keys[2]
    for other in curves[1:]:
        assert_close(other, curves[0])


def test_a_resumed_run_uses_a_new_learning_rate_decay_and_length(fit, tmp_path):
    fit(trainer={"max_steps": 3})
    optimizer = {"class_path": "gpt2_lightning.optim.AdamW", "init_args": {"lr": 1.0, "weight_decay": 0.5}}
    rates = fit(trainer={"max_steps": 5}, model={"optimizer": optimizer})["train/lr"]
    assert [rates[s] for s in (0, 1)] == pytest.approx([1.5e-3, 3e-3])
    expected = [3e-4 + 0.5 * (1 + math.cos(math.pi * (s - 2) / 3)) * (1.0 - 3e-4) for s in (3, 4)]
    assert [rates[s] for s in (3, 4)] == pytest.approx(expected)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert [group["weight_decay"] for group in checkpoint["optimizer_states"][0]["param_groups"]] == [0.5, 0.0]


def test_one_batch_can_be_overfitted(fit):
    loss = fit(
        trainer={"max_steps": 150, "overfit_batches": 1},
        model={"optimizer": {"class_path": "gpt2_lightning.optim.AdamW", "init_args": {"lr": 1e-2}}},
        data={"total_batch_tokens": 64},
        validation={"every_n_steps": 0},
        checkpoint={"every_n_steps": 0},
    )["train/loss"]
    assert loss[0] > 4
    assert loss[149] < 0.05


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"accumulate_grad_batches": 3}, "accumulate_grad_batches=3 disagrees with data.total_batch_tokens=128"),
        ({"overfit_batches": 3}, "overfit_batches=3 is not a multiple of the 2 micro-batches of a step"),
        ({"limit_train_batches": 3}, "set trainer.max_steps instead"),
        ({"fast_dev_run": True}, "set trainer.max_steps instead"),
    ],
)
def test_what_would_cut_a_step_is_refused(trainer, message, write_recipe, make_shards, refused):
    refused(["fit", "--config", write_recipe(make_shards(), trainer=trainer)], message)


def test_optimizers_and_schedules_of_torch_work(fit):
    step_lr = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 2, "gamma": 0.1}}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    rates = list(fit(model={"optimizer": sgd, "lr_scheduler": step_lr})["train/lr"].values())
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


def test_a_schedule_with_rates_of_its_own_keeps_them_over_a_resume(fit):
    settings = {"max_lr": 1e-3, "total_steps": 10}
    one_cycle = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": settings}
    fit(trainer={"max_steps": 3}, model={"lr_scheduler": one_cycle})
    rates = fit(model={"lr_scheduler": one_cycle})["train/lr"]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, **settings)
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(list(rates.values()), expected, rtol=1e-6)


def test_a_data_class_of_the_users_own_works(fit, read_scalars, tmp_path, monkeypatch):
    Path("mine.py").write_text(
        "from gpt2_lightning.data.datamodule import TokenDataModule\n\n\n"
        "class Mine(TokenDataModule):\n"
        "    def __init__(self, half: bool = False, **settings):\n"
        "        super().__init__(**settings)\n"
        "        self.micro_batch_size //= 2 if half else 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plain = fit()
    recipe = yaml.safe_load(Path("run.yaml").read_text()) | {"run_dir": "mine"}
    recipe["data"] = {"class_path": "mine.Mine", "init_args": recipe["data"] | {"half": True}}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    for path in ("mine.yaml", "mine/config.yaml"):  # the second is what the first run saved
        assert main(["fit", "--config", path]) == 0
    assert_close(read_scalars(Path("mine")), plain)
    checkpoint = torch.load("mine/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["Mine"]["micro_batch_size"] == 2


def test_activation_checkpointing_does_not_change_the_curve(fit):
    plain, checkpointed = (fit(str(on), model={"activation_checkpointing": on}) for on in (False, True))
    for tag in CURVES:
        assert checkpointed[tag] == plain[tag]


def test_without_gpt2s_vocabulary_hellaswag_and_samples_are_off(fit, capsys):
    assert set(fit(hellaswag={"every_n_steps": 3}, samples={"every_n_steps": 3})) == NAMES
    out = capsys.readouterr().out
    assert "HellaSwag is off" in out
    assert "samples are off" in out


def test_a_run_that_ends_early_is_evaluated_and_saved_where_it_ended(fit, tmp_path):
    never = {"every_n_steps": 10**6}
    logged = fit(trainer={"max_steps": 10**6, "max_time": "00:00:00:01"}, checkpoint=never, validation=never)
    step = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 10**6
    assert list(logged["val/loss"]) == [0, step]


def test_validate_gives_the_loss_that_fit_logged(fit, tmp_path, capsys):
    logged = fit()["val/loss"][6]
    capsys.readouterr()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["validate", "--config", "run.yaml", "--ckpt_path", str(last)]) == 0
    assert f"val/loss {logged:.4f}" in capsys.readouterr().out
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(("style", "tag"), [("nanogpt", "hellaswag"), ("harness", "hellaswag_harness")])
def test_each_style_of_hellaswag_has_a_tag_of_its_own(style, tag, fit, tmp_path, capsys):
    context = {"ctx_a": "A cook mixes", "ctx_b": "the cook", "ctx": "A cook mixes the cook"}
    endings = [f"{word} dough." for word in ("kneads", "sings", "flies", "sells")]
    example = {"ind": 1, "activity_label": "Baking", "endings": endings, "split": "val"} | context
    examples = [example | {"label": label} for label in range(4)]
    Path("examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    logged = fit(
        trainer={"max_steps": 1},
        model={"config": {"block_size": 32, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 8}},
        hellaswag={"every_n_steps": 1, "style": style, "path": "examples.jsonl"},
    )
    assert {name for name in logged if name.startswith("hella")} == {f"{tag}/acc", f"{tag}/acc_norm"}
    assert list(logged[f"{tag}/acc_norm"]) == [0, 1]
    assert set(logged[f"{tag}/acc"].values()) <= {0, 0.25, 0.5, 0.75, 1}
    assert f"{tag}/acc_norm" in capsys.readouterr().out
    events = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("events.*"))
    assert f"{tag}/examples".encode() in events
    assert b"examples.jsonl, 4 examples" in events


@pytest.mark.parametrize(
    ("precision", "block_size", "checkpointing", "fused"),
    [("32-true", 16, False, True), ("bf16-mixed", 16, False, False), ("bf16-mixed", 256, False, True),
     ("bf16-mixed", 16, True, True)],
)  # fmt: skip
def test_attention_is_not_fused_on_a_cpu_in_bf16_with_short_sequences(
    precision, block_size, checkpointing, fused, fit, monkeypatch
):
    attention, seen = F.scaled_dot_product_attention, set()

    def spy(*args, **kwargs):
        seen.add(torch.backends.cuda.flash_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    fit(
        trainer={"precision": precision, "max_steps": 1},
        model={"config": {"block_size": block_size, "vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16},
               "activation_checkpointing": checkpointing},
        data={"total_batch_tokens": block_size, "micro_batch_size": 1},
    )  # fmt: skip
    assert seen == {fused}
