"""Steps that are not finite change nothing, many in a row end the run, and ``--show`` prints the text of a step."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from gpt2_lightning.__main__ import main
from gpt2_lightning.module import GPTModule
from gpt2_lightning.tokenizer import get_tokenizer


@pytest.fixture
def poison(monkeypatch):
    """Multiplies the loss of the first micro-batch of the given steps by a value."""

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


def _tensors(checkpoint):
    moments = checkpoint["optimizer_states"][0]["state"]
    named = {f"{i}.{name}": value for i, of_parameter in moments.items() for name, value in of_parameter.items()}
    return checkpoint["state_dict"] | named


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_optimizer(
    value, poison, make_shards, write_recipe, read_scalars, tmp_path, capsys
):
    poison(value, 2, 3)
    recipe = write_recipe(make_shards(), trainer={"max_steps": 5}, checkpoint={"every_n_steps": 1})
    assert main(["fit", "--config", str(recipe)]) == 0
    states = [
        _tensors(torch.load(tmp_path / "run" / "checkpoints" / f"step_{step:06d}.ckpt", weights_only=True))
        for step in range(1, 6)
    ]
    for before, after, same in zip(states, states[1:], (False, True, True, False), strict=False):
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items()) == same
    logged = read_scalars(tmp_path / "run")
    assert list(logged["train/loss"]) == [0, 1, 2, 3, 4]  # the steps count, and so do their tokens
    assert logged["train/tokens"][4] == 5 * 128
    assert not math.isfinite(logged["train/loss"][2] + logged["train/grad_norm"][2])
    assert math.isfinite(logged["train/loss"][4])
    reports = [line for line in capsys.readouterr().out.splitlines() if "not applied" in line]
    assert [line.split(":")[0] for line in reports] == ["step 2", "step 3"]
    assert "sequences 16 to 23" in reports[0]


def test_several_in_a_row_end_the_run_and_name_their_sequences(poison, make_shards, write_recipe, capsys):
    poison(math.nan, 1, 3, 4, 5)
    recipe = write_recipe(make_shards(), trainer={"max_steps": 9}, nonfinite={"stop_after": 3})
    assert main(["fit", "--config", str(recipe)]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 5: loss nan" in message
    assert "(sequences 40 to 47)" in message
    assert "3 steps in a row" in message
    command = message.partition("`gpt2 ")[2].partition("`")[0].split()
    assert main(command) == 0  # the command that the message names shows them
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("──")]
    assert heads == [f"── step 5, sequence {i}: train sequence {i} ──" for i in range(40, 48)]
    # the count survives a resume: 3 again, after one more step
    assert main(["fit", "--config", str(recipe)]) == 1
    assert "step 5: loss nan" in capsys.readouterr().err


def test_show_prints_the_text_that_the_step_trained_on(make_shards, write_recipe, capsys, monkeypatch, tmp_path):
    seen = {}
    plain = GPTModule.training_step

    def training_step(self, batch, batch_idx):
        seen.setdefault(batch_idx // self.trainer.accumulate_grad_batches, []).extend(batch[:, :-1].tolist())
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(GPTModule, "training_step", training_step)
    schedule = {"start_tokens": 64, "ramp_tokens": 150}
    recipe = write_recipe(make_shards(), data={"order": "shuffled", "seed": 5, "batch_size_schedule": schedule})
    assert main(["fit", "--config", str(recipe)]) == 0
    for step, sequences in seen.items():
        capsys.readouterr()
        assert main(["prepare", "--show", str(tmp_path / "run"), "--step", str(step)]) == 0
        shown = capsys.readouterr().out
        assert shown.count("── step") == len(sequences)
        for sequence in sequences:
            assert get_tokenizer().decode(sequence) in shown


def test_show_refuses_what_is_not_a_run(make_shards, refused):
    root = make_shards()
    refused(["prepare", "--show", root], "is not the folder of a run")
    (root / "config.yaml").write_text("a: 1")
    refused(["prepare", "--show", root, "--step", "0"], "config.yaml is not the config of a run")


def test_ids_beyond_gpt2s_vocabulary_are_shown_as_numbers(make_shards, capsys):
    data = {"root": str(make_shards(train=np.array([464, 50300, 50301, 1290, 11]))), "total_batch_tokens": 4}
    config = {"data": data | {"order": "sequential", "seed": 0, "batch_size_schedule": None}}
    Path("config.yaml").write_text(yaml.safe_dump(config | {"model": {"config": {"block_size": 4}}}))
    assert main(["prepare", "--show", ".", "--step", "0"]) == 0
    assert capsys.readouterr().out == "── step 0, sequence 0: train sequence 0 ──\nThe<50300><50301> far\n"
