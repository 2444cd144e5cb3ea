"""``gpt2 fit`` as a user runs it: one step is one step, a run goes on where it was, and what it leaves behind."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from gpt2_lightning import load
from gpt2_lightning.__main__ import main
from gpt2_lightning.cli import fit as cli
from gpt2_lightning.optim import AdamW, decay_groups

NAMES = {"train/loss", "train/grad_norm", "train/lr", "train/tokens", "train/tokens_per_sec", "val/loss"}


def test_a_run_leaves_its_checkpoint_events_config_and_log(tmp_path, make_shards, write_recipe, read_scalars, capsys):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe)]) == 0
    run = tmp_path / "run"
    logged = read_scalars(run)
    assert set(logged) == NAMES
    assert list(logged["train/loss"]) == list(range(6))  # step s at x = s, as build-nanogpt numbers them
    assert list(logged["val/loss"]) == [0, 3, 6]  # 0, N, 2N …, the last
    assert logged["train/tokens"][5] == 6 * 128
    assert logged["val/loss"][0] == pytest.approx(math.log(64), abs=0.05)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "step_000003.ckpt",
        "step_000006.ckpt",
    ]
    lines = (run / "log.txt").read_text().splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == [
        "0 val", "0 train", "1 train", "2 train", "3 val", "3 train", "4 train", "5 train", "6 val"
    ]  # fmt: skip
    assert float(lines[1].split()[-1]) == pytest.approx(logged["train/loss"][0], abs=1e-6)
    last = capsys.readouterr().out.strip().splitlines()[-2:]
    assert str(run / "checkpoints" / "last.ckpt") in last[0]
    assert last[1].startswith("next: gpt2 validate ")  # 64 ids are no text

    # the saved config is a recipe: the same command with it finds the run finished
    before = (run / "log.txt").read_text()
    assert main(["fit", "--config", str(run / "config.yaml")]) == 0
    assert (run / "log.txt").read_text() == before


def test_a_checkpoint_holds_plain_types_under_hf_names(tmp_path, make_shards, write_recipe):
    assert main(["fit", "--config", str(write_recipe(make_shards()))]) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    shape = {"block_size": 16, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 16}
    assert checkpoint["hyper_parameters"]["config"] == shape
    assert checkpoint["global_step"] == 6
    assert "model.transformer.h.1.attn.c_attn.weight" in checkpoint["state_dict"]
    assert all(name.startswith("model.") for name in checkpoint["state_dict"])
    weight = load(path).transformer["wte"].weight
    assert torch.equal(weight, checkpoint["state_dict"]["model.transformer.wte.weight"])


def test_the_same_tokens_train_the_same_whatever_the_micro_batch(make_shards, write_recipe, read_scalars, tmp_path):
    root = make_shards()
    curves = []
    for micro_batch_size in (8, 4, 2):
        recipe = write_recipe(
            root, data={"micro_batch_size": micro_batch_size}, run_dir=str(tmp_path / f"b{micro_batch_size}")
        )
        assert main(["fit", "--config", str(recipe)]) == 0
        curves.append(read_scalars(tmp_path / f"b{micro_batch_size}"))
    for other in curves[1:]:
        for tag in ("train/loss", "train/grad_norm", "val/loss"):
            assert list(other[tag]) == list(curves[0][tag])
            np.testing.assert_allclose(list(other[tag].values()), list(curves[0][tag].values()), rtol=1e-5)


@pytest.mark.parametrize(("optimizer", "workers"), [("AdamW", 0), ("AdamW", 2), ("Muon", 0)])
def test_a_resumed_run_is_the_run_never_cut(optimizer, workers, make_shards, write_recipe, read_scalars, tmp_path):
    root = make_shards()
    schedule = {
        "class_path": "gpt2_lightning.schedule.WarmupCosine",
        "init_args": {"warmup_steps": 2, "max_steps": 6, "min_lr": 3e-4},
    }
    weights, curves = [], []
    for name, stops in (("whole", [6]), ("cut", [3, 6])):
        for stop in stops:
            recipe = write_recipe(
                root,
                name=f"{name}{stop}",
                trainer={"max_steps": stop},
                model={"lr_scheduler": schedule, "optimizer": {"class_path": f"gpt2_lightning.optim.{optimizer}"}},
                data={"order": "shuffled", "num_workers": workers},
                run_dir=str(tmp_path / name),
            )
            assert main(["fit", "--config", str(recipe)]) == 0
        weights.append(load(tmp_path / name / "checkpoints" / "last.ckpt").state_dict())
        curves.append(read_scalars(tmp_path / name))
    for tag in NAMES - {"train/tokens_per_sec"}:
        assert curves[1][tag] == curves[0][tag], tag
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "optimizer"), [("lightning", "Muon"), ("torchrun", "AdamW")])
def test_two_processes_train_as_one_does(launcher, optimizer, make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(
        make_shards(),
        model={"optimizer": {"class_path": f"gpt2_lightning.optim.{optimizer}"}},
        validation={"tokens": 528},  # 33 windows: an odd batch, uneven between the ranks
    )
    assert main(["fit", "--config", str(recipe)]) == 0
    alone = read_scalars(tmp_path / "run")
    torchrun = (
        [] if launcher == "lightning" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    )
    command = [sys.executable, *torchrun, "-m", "gpt2_lightning", "fit", "--config", str(recipe)]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--run_dir", "two"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters (") == 1  # one rank speaks
    both = read_scalars(Path("two"))
    for tag in NAMES - {"train/tokens_per_sec"}:
        assert list(both[tag]) == list(alone[tag])
        np.testing.assert_allclose(list(both[tag].values()), list(alone[tag].values()), rtol=1e-5, err_msg=tag)
    weights = [load(Path(run) / "checkpoints" / "last.ckpt").state_dict() for run in (tmp_path / "run", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


def test_ddp_keeps_the_gradients_in_its_buckets(make_shards, write_recipe, monkeypatch):
    settings = []

    def note(trainer):
        settings.append(trainer.strategy._ddp_kwargs)
        raise SystemExit(0)  # before Lightning's launcher writes into the environment

    monkeypatch.setattr(cli, "check_world_size", note)
    assert main(["fit", "--config", str(write_recipe(make_shards())), "--trainer.strategy", "ddp"]) == 0
    assert settings == [{"gradient_as_bucket_view": True}]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_checkpoint_is_the_same_compiled_or_not(make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(make_shards())
    runs = {"plain": ["false", "false"], "there": ["true", "false"], "back": ["false", "true"]}
    for name, (first, second) in runs.items():
        args = ["fit", "--config", str(recipe), "--run_dir", name, "--model.compile"]
        schedule = ["--model.lr_scheduler.init_args.max_steps", "6"]
        assert main([*args, first, *schedule, "--trainer.max_steps", "3"]) == 0
        assert main([*args, second, *schedule, "--resume", "must"]) == 0
    keys = [list(torch.load(f"{name}/checkpoints/step_000003.ckpt", weights_only=True)["state_dict"]) for name in runs]
    assert keys[0] == keys[1] == keys[2]
    curves = [read_scalars(Path(name)) for name in runs]
    for other in curves[1:]:
        for tag in ("train/loss", "train/grad_norm", "val/loss"):
            assert list(other[tag]) == list(curves[0][tag])
            np.testing.assert_allclose(list(other[tag].values()), list(curves[0][tag].values()), rtol=1e-5, err_msg=tag)


def test_a_resumed_run_obeys_a_new_learning_rate_decay_and_length(make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "3"]) == 0
    changes = ["--trainer.max_steps", "5", "--model.optimizer.lr", "1.0", "--model.optimizer.weight_decay", "0.5"]
    assert main(["fit", "--config", str(recipe), *changes]) == 0
    rates = read_scalars(tmp_path / "run")["train/lr"]
    assert [rates[s] for s in (0, 1)] == pytest.approx([1.5e-3, 3e-3])
    expected = [3e-4 + 0.5 * (1 + math.cos(math.pi * (s - 2) / 3)) * (1.0 - 3e-4) for s in (3, 4)]
    assert [rates[s] for s in (3, 4)] == pytest.approx(expected)
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert [group["weight_decay"] for group in checkpoint["optimizer_states"][0]["param_groups"]] == [0.5, 0.0]


def test_overfitting_one_batch(make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(
        make_shards(),
        trainer={"max_steps": 150, "overfit_batches": 1},
        data={"total_batch_tokens": 64},
        validation={"every_n_steps": 0},
        checkpoint={"every_n_steps": 0},
    )
    assert main(["fit", "--config", str(recipe), "--model.optimizer.lr", "1e-2"]) == 0
    loss = read_scalars(tmp_path / "run")["train/loss"]
    assert loss[0] > 4
    assert loss[149] < 0.05


def test_decay_groups_cover_each_parameter_once():
    from gpt2_lightning.model import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=8, vocab_size=32, n_layer=2, n_head=2, n_embd=8))
    decayed, spared = decay_groups(model.named_parameters())
    ids = [id(p) for p in decayed["params"] + spared["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())  # parameters() lists the tied one once
    assert "weight_decay" not in decayed  # takes the optimizer's own
    assert spared["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "ln_" in names[id(p)] for p in spared["params"])
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= {names[id(p)] for p in decayed["params"]}


def test_fused_adamw_makes_the_updates_of_torchs_own():
    torch.manual_seed(0)
    gradients = [torch.randn(5, 7) for _ in range(3)]
    results = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        p = torch.nn.Parameter(torch.ones(5, 7))
        optimizer = optimizer_class([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_a_users_own_optimizer_and_schedule(make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(
        make_shards(),
        model={
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.StepLR",
                "init_args": {"step_size": 2, "gamma": 0.1},
            },
        },
    )
    assert main(["fit", "--config", str(recipe)]) == 0
    rates = list(read_scalars(tmp_path / "run")["train/lr"].values())
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


def test_a_users_own_data_class(make_shards, write_recipe, read_scalars, tmp_path, monkeypatch):
    Path("mine.py").write_text(
        "from gpt2_lightning.data.datamodule import TokenDataModule\n\n\n"
        "class Mine(TokenDataModule):\n"
        "    def __init__(self, half: bool = False, **settings):\n"
        "        super().__init__(**settings)\n"
        "        self.micro_batch_size //= 2 if half else 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    root = make_shards()
    plain = write_recipe(root)
    settings = yaml.safe_load(plain.read_text())["data"]
    mine = write_recipe(root, name="mine", run_dir=str(tmp_path / "mine"))
    recipe = yaml.safe_load(mine.read_text())
    recipe["data"] = {"class_path": "mine.Mine", "init_args": settings | {"half": True}}
    mine.write_text(yaml.safe_dump(recipe))
    for path in (plain, mine, tmp_path / "mine" / "config.yaml"):  # the last is what the run before it has left
        assert main(["fit", "--config", str(path)]) == 0
    curves = [read_scalars(tmp_path / run)["train/loss"] for run in ("run", "mine")]
    np.testing.assert_allclose(list(curves[1].values()), list(curves[0].values()), rtol=1e-5)
    checkpoint = torch.load(tmp_path / "mine" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["Mine"]["micro_batch_size"] == 2


def test_activation_checkpointing_gives_the_same_losses(make_shards, write_recipe, read_scalars, tmp_path):
    root, curves = make_shards(), []
    for checkpointing in (False, True):
        run_dir = tmp_path / f"run-{checkpointing}"
        recipe = write_recipe(root, model={"activation_checkpointing": checkpointing}, run_dir=str(run_dir))
        assert main(["fit", "--config", str(recipe)]) == 0
        curves.append(read_scalars(run_dir))
    for tag in ("train/loss", "train/grad_norm", "val/loss"):
        assert curves[1][tag] == curves[0][tag]


def test_a_schedule_with_rates_of_its_own_keeps_them(make_shards, write_recipe, read_scalars, tmp_path):
    settings = {"max_lr": 1e-3, "total_steps": 10}
    one_cycle = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": settings}
    root = make_shards()
    for steps in (3, 6):  # begun, and gone on with
        recipe = write_recipe(root, trainer={"max_steps": steps}, model={"lr_scheduler": one_cycle})
        assert main(["fit", "--config", str(recipe)]) == 0
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, **settings)
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(list(read_scalars(tmp_path / "run")["train/lr"].values()), expected, rtol=1e-6)


def test_without_gpt2s_vocabulary_hellaswag_and_samples_say_that_they_are_off(make_shards, write_recipe, capsys):
    recipe = write_recipe(make_shards(), hellaswag={"every_n_steps": 3}, samples={"every_n_steps": 3})
    assert main(["fit", "--config", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "HellaSwag is off" in out
    assert "samples are off" in out


def test_lightnings_own_door_opens_a_checkpoint_and_a_plain_trainer_validates_it(make_shards, write_recipe, tmp_path):
    from lightning.pytorch import Trainer

    from gpt2_lightning.data.datamodule import TokenDataModule
    from gpt2_lightning.module import GPTModule

    root = make_shards()
    assert main(["fit", f"--config={write_recipe(root)}", "--trainer.enable_progress_bar", "false"]) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    module = GPTModule.load_from_checkpoint(last)
    for name, value in load(last).state_dict().items():
        assert torch.equal(module.model.state_dict()[name], value)
    data = TokenDataModule(root=str(root), source=None, micro_batch_size=4)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, use_distributed_sampler=False)
    assert trainer.validate(module, data, verbose=False)[0]["val/loss"] == pytest.approx(math.log(64), abs=0.1)


def test_a_run_that_ends_early_is_evaluated_and_saved_where_it_ended(make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(make_shards(), checkpoint={"every_n_steps": 10**6}, validation={"every_n_steps": 10**6})
    args = ["--trainer.max_steps", "1000000", "--trainer.max_time", "00:00:00:01"]
    assert main(["fit", "--config", str(recipe), *args]) == 0
    step = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 1000000
    assert list(read_scalars(tmp_path / "run")["val/loss"]) == [0, step]


def test_validate_gives_the_loss_that_fit_logged(make_shards, write_recipe, read_scalars, tmp_path, capsys):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe)]) == 0
    logged = read_scalars(tmp_path / "run")["val/loss"][6]
    capsys.readouterr()
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["validate", "--config", str(recipe), "--ckpt_path", str(last)]) == 0
    assert f"val/loss {logged:.4f}" in capsys.readouterr().out
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(("style", "tag"), [("nanogpt", "hellaswag"), ("harness", "hellaswag_harness")])
def test_the_two_styles_of_hellaswag_have_a_tag_each(
    style, tag, make_shards, write_recipe, read_scalars, tmp_path, capsys
):
    context = {"ctx_a": "A cook mixes", "ctx_b": "the cook", "ctx": "A cook mixes the cook"}
    endings = [f"{word} dough." for word in ("kneads", "sings", "flies", "sells")]
    row = {"ind": 1, "activity_label": "Baking", "endings": endings, "split": "val"} | context
    rows = [row | {"label": label} for label in range(4)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = {"block_size": 32, "vocab_size": 50304, "n_layer": 1, "n_head": 1, "n_embd": 8}
    recipe = write_recipe(
        make_shards(),
        trainer={"max_steps": 1},
        model={"config": shape},
        data={"micro_batch_size": 4},
        hellaswag={"every_n_steps": 1, "style": style, "path": "rows.jsonl"},
    )
    assert main(["fit", "--config", str(recipe)]) == 0
    logged = read_scalars(tmp_path / "run")
    assert {name for name in logged if name.startswith("hella")} == {f"{tag}/acc", f"{tag}/acc_norm"}
    assert list(logged[f"{tag}/acc_norm"]) == [0, 1]
    assert set(logged[f"{tag}/acc"].values()) <= {0, 0.25, 0.5, 0.75, 1}
    assert f"{tag}/acc_norm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "block_size", "checkpointing", "fused"),
    [("32-true", 16, False, True), ("bf16-mixed", 16, False, False), ("bf16-mixed", 256, False, True),
     ("bf16-mixed", 16, True, True)],
)  # fmt: skip
def test_a_cpu_attends_by_matmuls_in_bf16_and_short_contexts(
    precision, block_size, checkpointing, fused, make_shards, write_recipe, monkeypatch
):
    recipe = write_recipe(
        make_shards(),
        trainer={"precision": precision, "max_steps": 1},
        model={"config": {"block_size": block_size, "vocab_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16},
               "activation_checkpointing": checkpointing},
        data={"total_batch_tokens": block_size, "micro_batch_size": 1},
    )  # fmt: skip
    attention, seen = F.scaled_dot_product_attention, set()

    def watched(*args, **kwargs):
        seen.add(torch.backends.cuda.flash_sdp_enabled())
        return attention(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert main(["fit", "--config", str(recipe)]) == 0
    assert seen == {fused}
