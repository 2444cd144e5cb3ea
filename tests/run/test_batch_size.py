"""Batch-size schedules, and the micro-batch that ``auto`` takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2_lightning import load
from gpt2_lightning.__main__ import main
from gpt2_lightning.callbacks.micro_batch import AutoMicroBatch, fits
from gpt2_lightning.data.datamodule import TokenDataModule
from gpt2_lightning.model import GPTConfig
from gpt2_lightning.module import GPTModule

SCHEDULE = {"start_tokens": 32, "ramp_tokens": 300}
TOKENS = [32, 64, 96, 128, 192, 256, 320, 448, 576]
"""After each step: 4 of 32 tokens (the line from 32 to 128 reaches 64 at 100 tokens), 3 of 64, then 128."""


def test_a_batch_size_schedule_survives_resumes_and_other_micro_batches(
    make_shards, write_recipe, read_scalars, tmp_path
):
    root = make_shards()
    schedule = {
        "class_path": "gpt2_lightning.schedule.WarmupCosine",
        "init_args": {"warmup_steps": 2, "max_steps": 9, "min_lr": 3e-4},
    }
    curves, weights = [], []
    for name, stops, micro_batch_size in (("whole", [9], 4), ("cut", [2, 5, 7, 9], 4), ("other", [9], 8)):
        for stop in stops:
            recipe = write_recipe(
                root,
                name=f"{name}{stop}",
                trainer={"max_steps": stop},
                model={"lr_scheduler": schedule},
                data={"batch_size_schedule": SCHEDULE, "micro_batch_size": micro_batch_size, "order": "shuffled"},
                run_dir=str(tmp_path / name),
            )
            assert main(["fit", "--config", str(recipe)]) == 0
        curves.append(read_scalars(tmp_path / name))
        weights.append(load(tmp_path / name / "checkpoints" / "last.ckpt").state_dict())
    whole, cut, other = curves
    assert list(whole["train/tokens"].values()) == TOKENS
    for tag in ("train/loss", "train/grad_norm", "train/lr", "train/tokens"):
        assert cut[tag] == whole[tag], tag
        np.testing.assert_allclose(list(other[tag].values()), list(whole[tag].values()), rtol=1e-5, err_msg=tag)
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_auto_takes_at_most_16_on_a_cpu_and_a_resumed_run_keeps_its_size(make_shards, write_recipe, capsys):
    recipe = write_recipe(make_shards(), data={"total_batch_tokens": 16 * 48, "micro_batch_size": "auto"})
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "3"]) == 0
    assert "micro_batch_size: auto takes 16, 3 to a step" in capsys.readouterr().out
    assert main(["fit", "--config", str(recipe), "--data.micro_batch_size", "6", "--trainer.max_steps", "4"]) == 0
    assert main(["fit", "--config", str(recipe)]) == 0
    assert "micro_batch_size: auto takes 6, 8 to a step" in capsys.readouterr().out


@pytest.mark.parametrize(("room", "tried", "accumulate"), [(7, [48, 24, 12, 6], 8), (0, [48, 24, 12, 6, 3, 1], None)])
def test_auto_halves_until_a_step_fits_the_memory(room, tried, accumulate, make_shards, monkeypatch):
    sizes: list[int] = []

    def fits_in_room(module, micro_batch_size):
        sizes.append(micro_batch_size)
        return micro_batch_size <= room

    monkeypatch.setattr("gpt2_lightning.callbacks.micro_batch.fits", fits_in_room)
    monkeypatch.setattr(GPTModule, "device", torch.device("cuda"))
    module = GPTModule(GPTConfig(16, 64, 1, 1, 8))
    module.print = lambda *_: None
    data = TokenDataModule(str(make_shards()), None, total_batch_tokens=16 * 48, micro_batch_size="auto")
    trainer = SimpleNamespace(
        datamodule=data,
        lightning_module=module,
        world_size=1,
        max_steps=1,
        accumulate_grad_batches=1,
        strategy=SimpleNamespace(root_device=torch.device("cuda"), reduce_boolean_decision=lambda decision: decision),
    )
    data.trainer = trainer
    data.setup("fit")
    if accumulate is None:
        with pytest.raises(ValueError, match=r"a micro-batch of 1 does not fit .* model.chunked_loss"):
            AutoMicroBatch().on_fit_start(trainer, module)
    else:
        AutoMicroBatch().on_fit_start(trainer, module)
        assert (data.micro_batch_size, trainer.accumulate_grad_batches) == (sizes[-1], accumulate)
    assert sizes == tried


def test_trying_a_micro_batch_leaves_no_trace_whether_it_fits_or_not():
    module = GPTModule(GPTConfig(16, 64, 1, 1, 8))
    module.trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(train_step_context=torch.enable_grad), strategy=None
    )
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def loss(ids):
        if len(ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return module.model(ids[:, :-1]).sum()

    module.next_token_loss = loss
    assert [fits(module, size) for size in (8, 4)] == [False, True]
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.next_token_loss = lambda ids: torch.ones(2) @ torch.ones(3)  # not a lack of memory
    with pytest.raises(RuntimeError, match="size"):
        fits(module, 1)
