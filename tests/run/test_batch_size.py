"""How large steps and micro-batches are: the schedule that doubles them, and the size that auto takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt2_lightning import load
from gpt2_lightning.__main__ import main
from gpt2_lightning.callbacks.micro_batch import AutoMicroBatch
from gpt2_lightning.data.datamodule import TokenDataModule, micro_batch_sizes
from gpt2_lightning.model import GPTConfig
from gpt2_lightning.module import GPTModule

RAMP = {"start_tokens": 32, "ramp_tokens": 300}
TOKENS = [32, 64, 96, 128, 192, 256, 320, 448, 576]  # after each step: 4 of 32 (the line is at 100), 3 of 64, then 128


def test_a_ramp_counts_its_tokens_and_a_cut_changes_nothing(make_shards, write_recipe, read_scalars, tmp_path):
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
                data={"batch_size_schedule": RAMP, "micro_batch_size": micro_batch_size, "order": "shuffled"},
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


def test_micro_batches_shrink_with_the_step_and_their_number_stays():
    assert micro_batch_sizes(128, 16, 1, 128) == [1, 2, 4, 8]
    assert micro_batch_sizes(128, 16, 1, 32) == [4, 8]  # of 1 or 2 in the first steps
    assert micro_batch_sizes(128, 16, 2, 32) == [4]
    with pytest.raises(ValueError, match=r"start_tokens=32 .* 4 devices: set it to a multiple of 64"):
        micro_batch_sizes(128, 16, 4, 32)


def test_auto_takes_what_divides_and_on_a_cpu_at_most_16(make_shards, write_recipe, capsys, tmp_path):
    root = make_shards()
    recipe = write_recipe(root, data={"total_batch_tokens": 16 * 48, "micro_batch_size": "auto"})
    assert main(["fit", "--config", str(recipe), "--trainer.max_steps", "3"]) == 0
    assert "micro_batch_size: auto takes 16, 3 to a step" in capsys.readouterr().out
    # a run keeps what it had, for another size rounds otherwise
    assert main(["fit", "--config", str(recipe), "--data.micro_batch_size", "6", "--trainer.max_steps", "4"]) == 0
    assert main(["fit", "--config", str(recipe)]) == 0
    assert "micro_batch_size: auto takes 6, 8 to a step" in capsys.readouterr().out


@pytest.fixture
def on_a_gpu(make_shards):
    """A module on a pretended GPU with room for ``room`` sequences, and the trainer that AutoMicroBatch meets."""

    def make(room, total_batch_tokens=16 * 48):
        class Module(GPTModule):
            device = torch.device("cuda")
            tried: list[int] = []  # noqa: RUF012

            def fits(self, micro_batch_size):
                self.tried.append(micro_batch_size)
                return micro_batch_size <= room

        module = Module(GPTConfig(16, 64, 1, 1, 8))
        module.print = lambda *_: None
        data = TokenDataModule(str(make_shards()), None, total_batch_tokens=total_batch_tokens, micro_batch_size="auto")
        trainer = SimpleNamespace(
            datamodule=data,
            lightning_module=module,
            world_size=1,
            max_steps=1,
            overfit_batches=0.0,
            limit_train_batches=1.0,
            accumulate_grad_batches=1,
            strategy=SimpleNamespace(
                root_device=torch.device("cuda"), reduce_boolean_decision=lambda decision: decision
            ),
        )
        data.trainer = trainer
        data.setup("fit")
        return trainer, module

    return make


def test_auto_halves_until_a_step_fits_the_memory(on_a_gpu):
    trainer, module = on_a_gpu(room=7)
    AutoMicroBatch().on_fit_start(trainer, module)
    assert module.tried == [48, 24, 12, 6]
    assert (trainer.datamodule.micro_batch_size, trainer.accumulate_grad_batches) == (6, 8)


def test_auto_says_so_when_not_even_one_sequence_fits(on_a_gpu):
    trainer, module = on_a_gpu(room=0)
    with pytest.raises(ValueError, match=r"a micro-batch of 1 does not fit .* model.chunked_loss"):
        AutoMicroBatch().on_fit_start(trainer, module)


def test_a_trial_step_leaves_no_trace_whether_it_fits_or_not():
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
    assert [module.fits(b) for b in (8, 4)] == [False, True]
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    module.next_token_loss = lambda ids: torch.ones(2) @ torch.ones(3)  # another error is no lack of memory
    with pytest.raises(RuntimeError, match="size"):
        module.fits(1)
