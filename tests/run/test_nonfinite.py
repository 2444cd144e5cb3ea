"""A step whose loss or gradients are not finite changes nothing, and too many in a row end the run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from gpt2_lightning.__main__ import main
from gpt2_lightning.module import GPTModule


@pytest.fixture
def poison(monkeypatch):
    """Multiplies the loss of the given steps' first micro-batches by a value."""

    def steps(value, *which):
        plain = GPTModule.training_step

        def training_step(self, batch, batch_idx):
            step, micro_batch = divmod(batch_idx, self.trainer.accumulate_grad_batches)
            loss = plain(self, batch, batch_idx)
            if step in which and micro_batch == 0:
                self.loss_sum = self.loss_sum * value
                loss = loss * value
            return loss

        monkeypatch.setattr(GPTModule, "training_step", training_step)

    return steps


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_such_a_step_is_not_applied(value, poison, make_shards, write_recipe, read_scalars, tmp_path, capsys):
    poison(value, 2, 3)
    recipe = write_recipe(make_shards(), trainer={"max_steps": 5}, checkpoint={"every_n_steps": 1})
    assert main(["fit", "--config", str(recipe)]) == 0
    states = [
        torch.load(tmp_path / "run" / "checkpoints" / f"step_{step:06d}.ckpt", weights_only=True)
        for step in range(1, 6)
    ]
    for before, after, same in zip(states, states[1:], (False, True, True, False), strict=False):
        for part in ("state_dict", "moments"):
            one, other = (_tensors(state, part) for state in (before, after))
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one) == same
    logged = read_scalars(tmp_path / "run")
    assert list(logged["train/loss"]) == [0, 1, 2, 3, 4]  # the steps count, and so do their tokens
    assert logged["train/tokens"][4] == 5 * 128
    assert not math.isfinite(logged["train/loss"][2] + logged["train/grad_norm"][2])
    assert math.isfinite(logged["train/loss"][4])
    said = [line for line in capsys.readouterr().out.splitlines() if "not applied" in line]
    assert [line.split(":")[0] for line in said] == ["step 2", "step 3"]
    assert "samples 16 to 23" in said[0]


def _tensors(state, part):
    if part == "state_dict":
        return state["state_dict"]
    return {
        f"{i}.{name}": value
        for i, moments in state["optimizer_states"][0]["state"].items()
        for name, value in moments.items()
    }


def test_several_in_a_row_end_the_run_and_name_their_data(poison, make_shards, write_recipe, capsys, tmp_path):
    poison(math.nan, 1, 3, 4, 5)
    recipe = write_recipe(make_shards(), trainer={"max_steps": 9}, nonfinite={"stop_after": 3})
    assert main(["fit", "--config", str(recipe)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 5: loss nan" in said
    assert "(samples 40 to 47)" in said
    assert "3 steps in a row" in said
    command = said.partition("`gpt2 ")[2].partition("`")[0].split()
    assert main(command) == 0  # the command that it names shows them
    shown = capsys.readouterr().out
    assert [f"step 5, sample {i}: train window {i}" in shown for i in range(40, 48)] == [True] * 8
    assert "sample 39" not in shown
    assert "sample 48" not in shown
    # what a run never cut would have counted is counted over a resume as well: 3 again, after one more step
    assert main(["fit", "--config", str(recipe)]) == 1
    assert "step 5: loss nan" in capsys.readouterr().err


def test_a_steps_text_is_what_the_step_sees(make_shards, write_recipe, capsys, monkeypatch, tmp_path):
    from gpt2_lightning.tokenizer import get_tokenizer

    seen = {}
    plain = GPTModule.training_step

    def training_step(self, batch, batch_idx):
        seen.setdefault(batch_idx // self.trainer.accumulate_grad_batches, []).extend(batch[:, :-1].tolist())
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(GPTModule, "training_step", training_step)
    ramp = {"start_tokens": 64, "ramp_tokens": 150}
    recipe = write_recipe(make_shards(), data={"order": "shuffled", "seed": 5, "batch_size_schedule": ramp})
    assert main(["fit", "--config", str(recipe)]) == 0
    for step, rows in seen.items():
        capsys.readouterr()
        assert main(["prepare", "--show", str(tmp_path / "run"), "--step", str(step)]) == 0
        shown = capsys.readouterr().out
        assert shown.count("── step") == len(rows)
        for row in rows:
            assert get_tokenizer().decode(row) in shown
    assert main(["prepare", "--show", str(tmp_path / "run"), "--step", str(10**30)]) == 2
    assert main(["prepare", "--show", str(tmp_path / "run"), "--step", "-1"]) == 2
    assert "--step is -1: give a whole number of at least 0" in capsys.readouterr().err
    assert main(["prepare", "--show", "shards"]) == 1
    assert "shards is not the folder of a run" in capsys.readouterr().err
    (Path("shards") / "config.yaml").write_text("a: 1")
    assert main(["prepare", "--show", "shards", "--step", "0"]) == 1
    assert "config.yaml is not the config of a run" in capsys.readouterr().err


def test_ids_beyond_gpt2s_vocabulary_are_shown_as_numbers(make_shards, capsys):
    data = {"root": str(make_shards(train=np.array([464, 50300, 50301, 1290, 11]))), "total_batch_tokens": 4}
    config = {"data": data | {"order": "sequential", "seed": 0, "batch_size_schedule": None}}
    Path("config.yaml").write_text(yaml.safe_dump(config | {"model": {"config": {"block_size": 4}}}))
    assert main(["prepare", "--show", "."]) == 0
    assert capsys.readouterr().out == "── step 0, sample 0: train window 0 ──\nThe<50300><50301> far\n"


def test_the_text_of_a_run_that_took_the_shape_of_its_weights(make_shards, write_recipe, capsys, tmp_path):
    recipe = write_recipe(make_shards())
    assert main(["fit", "--config", str(recipe)]) == 0
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    tuned = write_recipe(tmp_path / "shards", name="tuned", model={"config": None, "init_from": last})
    assert main(["fit", "--config", str(tuned), "--run_dir", "tuned", "--trainer.max_steps", "1"]) == 0
    capsys.readouterr()
    assert main(["prepare", "--show", "tuned", "--step", "0"]) == 0
    assert capsys.readouterr().out.count("── step 0, sample") == 8  # 128 tokens in windows of 16
