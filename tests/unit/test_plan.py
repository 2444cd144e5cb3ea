"""``plan``: arithmetic on a parsed recipe."""

import pytest
import torch
from jsonargparse import Namespace

from gpt2_lightning.errors import UserError
from gpt2_lightning.tools.gpus import find_gpu, peak_flops
from gpt2_lightning.tools.plan import describe, plan


@pytest.fixture
def recipe() -> Namespace:
    """The video's recipe on 8 GPUs, as LightningCLI parses it."""
    adamw = Namespace(class_path="gpt2_lightning.optim.AdamW", init_args=Namespace(lr=6e-4))
    model = {"config": None, "init_from": None, "optimizer": adamw, "compile": "auto", "chunked_loss": "auto"}
    data = {"root": "absent", "source": "fineweb-edu", "total_batch_tokens": 524288, "micro_batch_size": 64}
    trainer = {"max_steps": 19073, "accelerator": "gpu", "devices": 8, "num_nodes": 1, "strategy": "ddp"}
    return Namespace(
        model=Namespace(**model, activation_checkpointing=False),
        data=Namespace(**data, batch_size_schedule=None),
        trainer=Namespace(**trainer, precision="bf16-mixed"),
    )


def test_the_videos_run_on_eight_h100(recipe):
    found = plan(recipe, find_gpu("h100"), dollars_per_hour=2.5)
    assert (found["devices"], found["micro_batch_size"], found["accumulate_grad_batches"]) == (8, 64, 1)
    assert (found["tokens"], found["steps"], found["tokens_per_step"]) == (9_999_745_024, 19_073, 524_288)
    assert found["epochs"] == pytest.approx(1.0, abs=1e-4)  # of fineweb-edu's 10B tokens
    assert found["flops"] == 9_999_745_024 * 798_031_872
    assert found["seconds"] == pytest.approx(2521.5, abs=0.1)  # 7.980e18 / (8 · 989e12 · 0.4)
    assert found["dollars"] == pytest.approx(14.01, abs=0.01)  # 8 · 2521.5 / 3600 · 2.5
    assert found["memory_bytes"]["sum"] == 37_522_974_720
    assert found["fits"]
    assert found["notes"] == []
    text = describe(found)
    assert "time     0:42:02 (3,965,756 tokens/s) without evaluation, assuming an MFU of 40% of 989 TFLOP/s" in text
    assert "cost     $14.01 at $2.50 per GPU hour" in text


def test_fewer_gpus_accumulate_more_and_take_proportionally_longer(recipe):
    eight, one = (plan(recipe, find_gpu("a100"), gpus=n) for n in (8, 1))
    assert one["accumulate_grad_batches"] == 8
    assert one["tokens"] == eight["tokens"]
    assert one["seconds"] == pytest.approx(8 * eight["seconds"])
    assert eight["memory_bytes"] == one["memory_bytes"]  # with ddp, gradients are in the buckets


def test_other_ddp_strategies_hold_the_gradients_twice(recipe):
    recipe.trainer.strategy = "ddp_find_unused_parameters_false"
    assert plan(recipe)["memory_bytes"]["DDP's buckets"] == 497_903_616  # 4 · 124,475,904
    one_copy = Namespace(gradient_as_bucket_view=True)
    recipe.trainer.strategy = Namespace(class_path="lightning.pytorch.strategies.DDPStrategy", init_args=one_copy)
    assert "DDP's buckets" not in plan(recipe)["memory_bytes"]


def test_fully_shard_divides_the_state_among_the_devices(recipe):
    recipe.trainer.strategy = "fully_shard"
    found = plan(recipe)
    assert found["step"]["shards"] == 8
    assert len(found["notes"]) == 1


def test_auto_takes_the_largest_micro_batch_that_fits_and_divides_the_step(recipe):
    recipe.data.micro_batch_size = "auto"
    found = plan(recipe, find_gpu("24GB"), gpus=1)
    assert found["micro_batch_size"] == found["largest_micro_batch"] == 32
    assert found["memory_bytes"]["sum"] <= 0.9 * 24 * 2**30
    assert "seconds" not in found  # the peak is unknown
    recipe.data.micro_batch_size = 64
    assert "no, a micro-batch of 64 does not fit" in describe(plan(recipe, find_gpu("24GB"), gpus=1))
    nothing_fits = plan(recipe, find_gpu("1GB"))
    assert nothing_fits["largest_micro_batch"] is None
    assert "try --model.chunked_loss true --model.activation_checkpointing true" in describe(nothing_fits)


def test_a_batch_size_schedule_counts_its_tokens(recipe):
    recipe.data.batch_size_schedule = Namespace(start_tokens=131072, ramp_tokens=393216)
    recipe.trainer.max_steps = 6
    found = plan(recipe, gpus=1)
    assert (found["first_tokens_per_step"], found["tokens"]) == (131072, 131072 + 262144 + 4 * 524288)


def test_openais_weights_bring_their_own_config(recipe):
    recipe.model.init_from, recipe.data.source, recipe.data.micro_batch_size = "gpt2-xl", "stdlib", 1
    found = plan(recipe)
    assert found["parameters"]["all"] == 1_557_611_200
    assert found["epochs"] is None


@pytest.mark.parametrize(("devices", "nodes", "count"), [(2, 3, 6), ([0, 1], 1, 2), ("0,1,", 1, 2), ("auto", 2, 2)])
def test_devices_are_counted_over_all_nodes(recipe, devices, nodes, count):
    recipe.trainer.accelerator, recipe.trainer.devices, recipe.trainer.num_nodes = "cpu", devices, nodes
    recipe.data.total_batch_tokens, recipe.data.micro_batch_size = 6 * 1024, 1
    assert plan(recipe)["devices"] == count


def test_assumptions_are_noted(recipe):
    recipe.model.optimizer.class_path = "torch.optim.Adagrad"
    recipe.trainer.precision = "32-true"
    notes = plan(recipe, find_gpu("h100"))["notes"]
    assert notes[0] == "the state size of Adagrad is unknown: assuming as much as AdamW's"
    assert "with TF32" in notes[1]


@pytest.mark.parametrize(
    ("section", "name", "value", "message"),
    [
        ("data", "total_batch_tokens", 500_000, "total_batch_tokens=500000"),
        ("data", "micro_batch_size", 48, "micro_batch_size to one of"),
        ("data", "micro_batch_size", "auto", "give --gpu or --micro_batch_size"),
        ("trainer", "precision", "transformer-engine", "give one of 32-true, bf16-mixed"),
    ],
)
def test_recipes_that_cannot_be_planned_are_refused(recipe, section, name, value, message):
    recipe[section][name] = value
    with pytest.raises(UserError, match=message):
        plan(recipe)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_peak_of_a_device_follows_from_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_a_gpu_is_found_by_name_or_by_its_memory():
    assert (find_gpu("H100").memory_gb, find_gpu("a100").memory_gb, find_gpu("a100-40").memory_gb) == (80, 80, 40)
    assert (find_gpu("24GB").memory_gb, find_gpu("24GB").peak_flops) == (24, None)
    with pytest.raises(UserError, match=r"unknown GPU 'h10': choose from 3090, .* or give the memory, such as 24GB"):
        find_gpu("h10")
