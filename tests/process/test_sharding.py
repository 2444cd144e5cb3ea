"""``fully_shard``: DDP's numbers, DDP's checkpoints, a part of the parameters on each device."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt2_lightning.__main__ import main
from gpt2_lightning.checkpoints.load import export, load


class CountsParameters(Callback):
    """Writes how many numbers of the parameters this rank holds."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = sum(p.to_local().numel() for p in pl_module.parameters())  # type: ignore[attr-defined, operator, misc]
        Path(f"held-{trainer.global_rank}").write_text(str(held))


def _two_processes(recipe: Path, strategy: str, run_dir: str, *flags: str) -> str:
    command = [sys.executable, "-m", "gpt2_lightning", "fit", "--config", str(recipe), "--run_dir", run_dir]
    command += ["--trainer.devices", "2", "--trainer.strategy", strategy, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_fully_shard_is_ddp_in_parts_and_each_goes_on_from_the_others_checkpoints(
    make_shards, write_recipe, read_scalars, tmp_path, capsys
):
    transformers = pytest.importorskip("transformers")
    recipe = write_recipe(make_shards(), validation={"tokens": 528})  # 33 windows: uneven between the ranks
    probe = "--trainer.callbacks+=test_sharding.CountsParameters"
    _two_processes(recipe, "ddp", "ddp")
    _two_processes(recipe, "fully_shard", "fully_shard", probe)
    whole = load("ddp/checkpoints/last.ckpt")
    held = [int(Path(f"held-{rank}").read_text()) for rank in (0, 1)]
    assert sum(held) == whole.num_parameters()
    assert max(held) < 0.51 * whole.num_parameters()

    export("fully_shard/checkpoints/last.ckpt", "exported")
    sharded = transformers.AutoModelForCausalLM.from_pretrained("exported")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(sharded(ids).logits, whole(ids), rtol=0, atol=1e-6)
    for name, value in load("exported").state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=0, atol=1e-6, msg=name)
    command = ["validate", "--config", str(recipe), "--trainer.strategy", "fully_shard"]
    assert main([*command, "--ckpt_path", "fully_shard/checkpoints/last.ckpt"]) == 0
    val_loss = read_scalars(Path("fully_shard"))["val/loss"][6]
    assert f"val/loss {val_loss:.4f}" in capsys.readouterr().out

    for before, after in (("ddp", "fully_shard"), ("fully_shard", "ddp")):
        shutil.copytree(before, f"{before}-{after}")
        said = _two_processes(recipe, after, f"{before}-{after}", "--trainer.max_steps", "8")
        assert f"resuming from {before}-{after}/checkpoints/last.ckpt at step 6" in said
    _two_processes(recipe, "ddp", "ddp", "--trainer.max_steps", "8")
    expected = read_scalars(Path("ddp"))
    assert list(expected["train/loss"]) == list(range(8))
    for run in ("ddp-fully_shard", "fully_shard-ddp"):
        logged = read_scalars(Path(run))
        assert logged.keys() == expected.keys()
        for tag in expected.keys() - {"train/tokens_per_sec"}:
            assert list(logged[tag]) == list(expected[tag]), tag
            np.testing.assert_allclose(list(logged[tag].values()), list(expected[tag].values()), rtol=1e-5, err_msg=tag)


@pytest.mark.slow
def test_what_one_rank_does_alone_does_not_wait_for_the_others_parts(make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(
        make_shards(),
        model={"config": {"block_size": 64, "vocab_size": 50304, "n_layer": 2, "n_head": 2, "n_embd": 16}},
        data={"micro_batch_size": 1},
        trainer={"max_steps": 2},
        validation={"every_n_steps": 1, "tokens": 1088},
        hellaswag={"every_n_steps": 2, "path": "builtin"},
        samples={"every_n_steps": 1, "num_samples": 1, "max_new_tokens": 4, "prompt": "a"},
    )
    assert main(["fit", "--config", str(recipe)]) == 0
    said = _two_processes(recipe, "fully_shard", "sharded", "--model.activation_checkpointing", "true")
    assert said.count("| sample 0: a") == 3
    alone, sharded = (read_scalars(run) for run in (tmp_path / "run", Path("sharded")))
    for tag in ("hellaswag/acc", "hellaswag/acc_norm"):
        assert sharded[tag] == alone[tag]
    for tag in ("val/loss", "train/loss"):
        np.testing.assert_allclose(list(sharded[tag].values()), list(alone[tag].values()), rtol=1e-5, err_msg=tag)


def test_muon_says_that_it_needs_whole_matrices(make_shards, write_recipe):
    recipe = write_recipe(make_shards())
    flags = ["--trainer.strategy", "fully_shard", "--model.optimizer", "gpt2_lightning.optim.Muon"]
    done = subprocess.run(
        [sys.executable, "-m", "gpt2_lightning", "fit", "--config", str(recipe), *flags],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "these are sharded: set trainer.strategy to ddp" in done.stderr
    assert "Traceback" not in done.stderr
