"""Two processes: DDP trains as one process does, and ``fully_shard`` as DDP, with part of the parameters on each."""

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
from gpt2_lightning.checkpoints.export import export
from gpt2_lightning.checkpoints.load import load

pytestmark = pytest.mark.slow


class CountsParameters(Callback):
    """Writes how many numbers of the parameters this rank holds."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = sum(p.to_local().numel() for p in pl_module.parameters())  # type: ignore[attr-defined, operator, misc]
        Path(f"held-{trainer.global_rank}").write_text(str(held))


def run(recipe, *flags, torchrun=False):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if torchrun else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "gpt2_lightning", "fit", "--config", str(recipe), *flags],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def two_processes(recipe, strategy, run_dir, *flags, torchrun=False):
    done = run(recipe, "--run_dir", run_dir, "--trainer.devices=2", f"--trainer.strategy={strategy}", *flags,
               torchrun=torchrun)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_close(curves, reference, tags=None):
    for tag in tags or reference.keys() - {"train/tokens_per_sec"}:
        assert list(curves[tag]) == list(reference[tag])
        np.testing.assert_allclose(list(curves[tag].values()), list(reference[tag].values()), rtol=1e-5, err_msg=tag)


@pytest.mark.parametrize(("torchrun", "optimizer"), [(False, "Muon"), (True, "AdamW")])
def test_two_processes_train_as_one_does(torchrun, optimizer, make_shards, write_recipe, read_scalars, tmp_path):
    recipe = write_recipe(
        make_shards(),
        model={"optimizer": {"class_path": f"gpt2_lightning.optim.{optimizer}"}},
        validation={"tokens": 528},  # 33 sequences: an odd batch, uneven between the ranks
    )
    assert main(["fit", "--config", str(recipe)]) == 0
    out = two_processes(recipe, "ddp", "two", torchrun=torchrun)
    assert out.count("parameters (") == 1  # printed by rank 0 only
    assert_close(read_scalars(Path("two")), read_scalars(tmp_path / "run"))
    one, two = (load(run / "checkpoints" / "last.ckpt").state_dict() for run in (tmp_path / "run", Path("two")))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_fully_shard_trains_as_ddp_does_and_each_resumes_the_other(
    make_shards, write_recipe, read_scalars, tmp_path, capsys
):
    transformers = pytest.importorskip("transformers")
    recipe = write_recipe(make_shards(), validation={"tokens": 528})
    two_processes(recipe, "ddp", "ddp")
    two_processes(recipe, "fully_shard", "fully_shard", "--trainer.callbacks+=test_sharding.CountsParameters")
    whole = load("ddp/checkpoints/last.ckpt")
    held = [int(Path(f"held-{rank}").read_text()) for rank in (0, 1)]
    assert sum(held) == whole.num_parameters()
    assert max(held) < 0.51 * whole.num_parameters()

    export("fully_shard/checkpoints/last.ckpt", "exported")
    sharded = transformers.AutoModelForCausalLM.from_pretrained("exported")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        torch.testing.assert_close(sharded(ids).logits, whole(ids), rtol=0, atol=1e-6)
    command = ["validate", "--config", str(recipe), "--trainer.strategy", "fully_shard"]
    assert main([*command, "--ckpt_path", "fully_shard/checkpoints/last.ckpt"]) == 0
    assert f"val/loss {read_scalars(Path('fully_shard'))['val/loss'][6]:.4f}" in capsys.readouterr().out

    resumed = (("ddp", "fully_shard"), ("fully_shard", "ddp"))
    for before, after in resumed:
        shutil.copytree(before, f"{before}-{after}")
        out = two_processes(recipe, after, f"{before}-{after}", "--trainer.max_steps", "8")
        assert f"resuming from {before}-{after}/checkpoints/last.ckpt at step 6" in out
    two_processes(recipe, "ddp", "ddp", "--trainer.max_steps", "8")
    expected = read_scalars(Path("ddp"))
    assert list(expected["train/loss"]) == list(range(8))
    for before, after in resumed:
        assert_close(read_scalars(Path(f"{before}-{after}")), expected)


def test_a_sharded_model_is_evaluated_and_sampled_as_a_whole_one(make_shards, write_recipe, read_scalars, tmp_path):
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
    out = two_processes(recipe, "fully_shard", "sharded", "--model.activation_checkpointing", "true")
    assert out.count("| sample 0: a") == 3
    one, sharded = (read_scalars(run) for run in (tmp_path / "run", Path("sharded")))
    for tag in ("hellaswag/acc", "hellaswag/acc_norm"):
        assert sharded[tag] == one[tag]
    assert_close(sharded, one, ("val/loss", "train/loss"))


def test_muon_refuses_sharded_matrices(make_shards, write_recipe):
    done = run(write_recipe(make_shards()), "--trainer.strategy=fully_shard",
               "--model.optimizer=gpt2_lightning.optim.Muon")  # fmt: skip
    assert done.returncode == 1
    assert "sharded: set trainer.strategy to ddp" in done.stderr
    assert "Traceback" not in done.stderr
