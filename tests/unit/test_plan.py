"""``gpt2 plan``: its formulas against literals and against what PyTorch itself counts, its reading of a recipe."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from gpt2_lightning.__main__ import main
from gpt2_lightning.loss import LinearCrossEntropy, chunk_of
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.optim import AdamW, Muon, decay_groups
from gpt2_lightning.tools.gpus import find_gpu, peak_flops
from gpt2_lightning.tools.memory import (
    Step,
    activations_bytes,
    autocast_copies_bytes,
    count_parameters,
    flops_per_token,
    logits_bytes,
    memory,
    optimizer_bytes,
    recomputed_flops_per_token,
)
from gpt2_lightning.tools.plan import OPENAI_SHAPES

RECIPES = Path(__file__).parents[2] / "configs"
FP32, BF16 = Step(4, 4, cpu=True), Step(4, 2, cpu=True)


@pytest.fixture
def plan(capsys):
    """Runs ``gpt2 plan ARGS --json``; what it printed."""

    def run(*args: object) -> dict:
        capsys.readouterr()
        assert main(["plan", *map(str, args), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


# -- parameters, FLOPs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_parameters_are_those_published_and_those_of_the_network(name, parameters):
    config = OPENAI_SHAPES[name]
    with torch.device("meta"):
        model = GPT(config)
    decayed, others = (sum(p.numel() for p in group["params"]) for group in decay_groups(model.named_parameters()))
    assert count_parameters(config) == (decayed, others)
    assert decayed + others == parameters


def test_flops_per_token():
    assert flops_per_token(GPTConfig()) == 798_031_872
    # forward of the blocks: 2 · 12 · 12 · 768² for the weights, 2 · 12 · 768 · 1024 for causal attention
    assert recomputed_flops_per_token(GPTConfig()) == 169_869_312 + 18_874_368


# -- memory, on literals -----------------------------------------------------------------------------------------------


def test_memory_of_the_video_s_run_on_literals():
    parts = memory(GPTConfig(), 64, Step(4, 2, compiled=True, ddp=True))
    assert parts == {
        "weights": 497_903_616,  # 4 · 124,475,904
        "weights in 16 bits": 247_302_144,  # 2 · (84,934,656 + 82,944 biases + 38,633,472 of the head)
        "gradients": 497_903_616,
        "DDP's buckets": 497_903_616,
        "optimizer": 995_807_232,
        "activations": 22_097_166_336,  # 65,536 tokens · (12 · 27,712 + 4,632)
        "logits": 13_186_891_776,  # 65,536 · 50,304 · 2, and as much for their gradient
    }
    assert memory(GPTConfig(), 64, Step(4, 2))["logits"] == 39_560_675_328  # 65,536 · 50,304 · 4 · 3


def test_memory_of_a_chunk_does_not_grow_with_the_micro_batch():
    step = Step(4, 2, chunked_loss=True)
    one, two = (memory(GPTConfig(), b, step)["logits"] for b in (1, 2))
    assert two - one == 1024 * 768 * 4 * 2  # but for the hidden states and their gradient
    # 512 rows in bf16 and in fp32, the head's gradient in fp32 and that of a chunk in bf16, the hidden states' two
    assert one == 512 * 50304 * 6 + 38_633_472 * 6 + 6_291_456


def test_checkpointing_keeps_a_block_s_input():
    step = Step(4, 2, chunked_loss=True, activation_checkpointing=True)
    # per token: 12 inputs of 3,072 bytes, one whole block of 27,712, both ends 4,632
    assert memory(GPTConfig(), 1, step)["activations"] == 1024 * (36_864 + 27_712 + 4_632)
    whole = memory(GPTConfig(), 1, Step(4, 2, activation_checkpointing=True))
    assert whole["activations"] == 1024 * (36_864 + 4_632)  # the block's turn comes when the larger logits are gone


def test_the_readme_s_table_is_what_plan_says():
    readme = (RECIPES.parent / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) GB \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", readme, re.MULTILINE)
    assert len(rows) == 5
    for gb, *largest in rows:
        for size, chunked, checkpointing in zip(largest, (0, 0, 1, 1), (0, 1, 0, 1), strict=True):
            step = Step(4, 2, compiled=True, chunked_loss=bool(chunked), activation_checkpointing=bool(checkpointing))
            one, two = (sum(memory(GPTConfig(), b, step).values()) for b in (int(size), 2 * int(size)))
            assert one <= 0.9 * 2**30 * int(gb) < two or size == "512"  # a step of 524,288 tokens


def test_optimizer_state_on_literals():
    config, numbers = GPTConfig(), 124_475_904
    assert optimizer_bytes(config, Step(optimizer="AdamW")) == 8 * numbers
    assert optimizer_bytes(config, Step(optimizer="AdamW", optimizer_args={"amsgrad": True})) == 12 * numbers
    assert optimizer_bytes(config, Step(optimizer="SGD", optimizer_args={"momentum": 0.0})) == 0
    assert optimizer_bytes(config, Step(optimizer="SGD", optimizer_args={"momentum": 0.9})) == 4 * numbers
    assert optimizer_bytes(config, Step(optimizer="Muon")) == 4 * 84_934_656 + 8 * (numbers - 84_934_656)


def test_sharded_training_keeps_a_share_of_the_state():
    whole, shared = (memory(GPTConfig(), 1, Step(4, 2, shards=n)) for n in (1, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert shared[part] * 8 == whole[part]
    assert shared["gathered weights"] == 4 * (50304 * 768 + 1024 * 768 + 2 * 7_077_888)


# -- memory, against PyTorch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [AdamW, Muon, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_optimizer_state_is_what_the_optimizer_keeps(optimizer):
    config = GPTConfig(16, 64, 2, 2, 32)
    model = GPT(config)
    made = optimizer(decay_groups(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    made.step()
    kept = sum(t.nbytes for state in made.state.values() for t in state.values() if t is not None and t.dim() > 0)
    name, args = type(made).__name__, getattr(optimizer, "keywords", None)
    assert optimizer_bytes(config, Step(optimizer=name, optimizer_args=args)) == kept


@contextmanager
def _saved(model: GPT) -> Iterator[dict[int, torch.Tensor]]:
    """What autograd saves, one tensor of each storage, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            found[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield found


def _loss(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    hidden = model.hidden(ids[:, :-1]).flatten(0, 1)
    return F.cross_entropy(F.linear(hidden, model.lm_head.weight), ids[:, 1:].flatten())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("config", "micro_batch_size"),
    [
        (GPTConfig(64, 512, 2, 4, 64), 3),
        (GPTConfig(256, 320, 6, 6, 192), 2),
        (GPTConfig(128, 4096, 3, 2, 128), 8),
        (GPTConfig(128, 1024, 1, 12, 768), 4),
    ],
)
def test_activations_and_logits_are_what_autograd_saves(config, micro_batch_size, bf16):
    model, step = GPT(config), BF16 if bf16 else FP32
    tokens = micro_batch_size * config.block_size
    ids = torch.randint(0, config.vocab_size, (micro_batch_size, config.block_size + 1))
    with _saved(model) as found, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        _loss(model, ids)
    sizes = {key: t.untyped_storage().nbytes() for key, t in found.items()}
    logits = sum(sizes[key] for key, t in found.items() if t.shape == (tokens, config.vocab_size))
    assert logits_bytes(config, tokens, step) == 3 * logits  # saved once; the backward makes two more of its size
    expected = sum(sizes.values()) - logits
    planned = activations_bytes(config, tokens, step) + autocast_copies_bytes(config, step)
    assert planned == pytest.approx(expected, rel=0.02)


def test_a_compiled_loss_saves_its_logits_in_16_bits():
    config = GPTConfig(64, 512, 1, 4, 64)
    model, ids = GPT(config), torch.randint(0, 512, (3, 65))
    # the compiler's own choice of what to save, run without generating code
    compiled = torch.compile(partial(_loss, model), dynamic=False, backend="aot_eager_decomp_partition")
    with _saved(model) as found, torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(ids)
    logits = [t for t in found.values() if t.shape == (192, 512)]
    assert [t.dtype for t in logits] == [torch.bfloat16]
    assert logits_bytes(config, 192, Step(4, 2, compiled=True)) == 2 * logits[0].nbytes
    rest = sum(t.untyped_storage().nbytes() for t in found.values()) - logits[0].nbytes
    step = Step(4, 2, compiled=True)
    assert activations_bytes(config, 192, step) + autocast_copies_bytes(config, step) == pytest.approx(rest, rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sum_is_the_peak_of_a_step(bf16, chunked, checkpointing):
    """PyTorch's tracker sees each tensor that is made; the gradients of an earlier micro-batch are there already."""
    config = GPTConfig(128, 4096, 3, 4, 128)
    model = GPT(config)
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(decay_groups(model.named_parameters()), foreach=False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    criterion = LinearCrossEntropy(chunk_of(4096) if chunked else None)
    ids = torch.zeros(8, 129, dtype=torch.long)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            hidden = model.hidden(ids[:, :-1])
            loss = criterion(hidden.flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten())
        del hidden
        loss.backward()
    peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
    step = Step(4, 2 if bf16 else 4, chunked_loss=chunked, activation_checkpointing=checkpointing, cpu=True)
    assert sum(memory(config, 8, step).values()) == pytest.approx(peak, rel=0.1 if chunked or checkpointing else 0.02)


MEASURE = """
import torch
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.optim import AdamW, decay_groups

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

def update(config):
    model = GPT(config)
    optimizer = AdamW(decay_groups(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()

update(GPTConfig(16, 64, 1, 2, 32))  # what is loaded and allocated once
before = peak()
update(GPTConfig(1024, 8192, 5, 8, 512))
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_parameters_gradients_and_optimizer_are_what_the_process_takes():
    measured = int(subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, check=True, text=True).stdout)
    parts = memory(GPTConfig(1024, 8192, 5, 8, 512), 1, FP32)
    planned = parts["weights"] + parts["gradients"] + parts["optimizer"]
    assert planned > 300e6
    assert planned == pytest.approx(measured, rel=0.1)


# -- GPUs --------------------------------------------------------------------------------------------------------------


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
def test_peak_of_a_device_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(torch.device("cpu")) is None


def test_a_gpu_by_name_or_by_its_memory():
    assert (find_gpu("H100").memory_gb, find_gpu("a100").memory_gb, find_gpu("a100-40").memory_gb) == (80, 80, 40)
    assert (find_gpu("24GB").memory_gb, find_gpu("24GB").peak_flops) == (24, None)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_video_s_recipe_on_a_machine_without_its_gpus(plan):
    found = plan("--config", RECIPES / "gpt2_124m.yaml", "--gpu", "h100", "--dollars_per_hour", "2.5")
    assert (found["devices"], found["micro_batch_size"], found["accumulate_grad_batches"]) == (8, 64, 1)
    assert (found["tokens"], found["steps"], found["tokens_per_step"]) == (9_999_745_024, 19_073, 524_288)
    assert found["epochs"] == pytest.approx(1.0, abs=1e-4)  # of 10B tokens, though none of them are here
    assert found["flops"] == 9_999_745_024 * 798_031_872
    assert found["mfu"] == 0.4
    assert found["seconds"] == pytest.approx(2521.5, abs=0.1)  # 7.980e18 / (8 · 989e12 · 0.4)
    assert found["dollars"] == pytest.approx(14.01, abs=0.01)  # 8 · 2521.5 / 3600 · 2.5
    assert found["memory_bytes"]["sum"] == 37_522_974_720
    assert found["fits"]
    assert not Path("runs").exists()


def test_more_gpus_accumulate_less_and_only_the_time_changes(plan):
    eight, one = (plan("--config", RECIPES / "gpt2_124m.yaml", "--gpu", "a100", "--gpus", n) for n in (8, 1))
    assert one["accumulate_grad_batches"] == 8
    assert one["tokens"] == eight["tokens"]
    assert one["seconds"] == pytest.approx(8 * eight["seconds"])
    assert eight["memory_bytes"] == one["memory_bytes"]
    args = ("--config", RECIPES / "gpt2_124m.yaml", "--trainer.strategy", "ddp_find_unused_parameters_false")
    assert plan(*args)["memory_bytes"]["DDP's buckets"] == 497_903_616  # 4 · 124,475,904


def test_the_largest_micro_batch_divides_the_step_and_fits(plan):
    args = ("--config", RECIPES / "gpt2_124m.yaml", "--gpus", 1, "--data.micro_batch_size", "auto")
    found = plan(*args, "--gpu", "24GB")
    assert found["micro_batch_size"] == found["largest_micro_batch"] == 32
    assert found["memory_bytes"]["sum"] <= 0.9 * 24 * 2**30
    assert plan(*args, "--gpu", "24GB", "--micro_batch_size", 64)["fits"] is False
    assert "seconds" not in found
    assert plan(*args, "--gpu", "1GB")["largest_micro_batch"] is None


def test_command_line_overrides_are_those_of_fit(plan, write_recipe, make_shards):
    recipe = write_recipe(make_shards())
    found = plan("--config", recipe, "--trainer.max_steps", 10, "--model.config.n_layer=3", "--data.micro_batch_size=2")
    assert (found["steps"], found["tokens"], found["accumulate_grad_batches"]) == (10, 1280, 4)
    assert found["shape"]["n_layer"] == 3
    assert (found["data_tokens"], found["epochs"]) == (20_000, 0.064)
    assert found["step"]["chunked_loss"]  # as fit does on a CPU
    assert not Path("run").exists()


def test_a_ramp_of_the_batch_is_counted(plan, write_recipe, make_shards):
    ramp = {"start_tokens": 32, "ramp_tokens": 96}
    data = {"root": str(make_shards()), "source": None, "total_batch_tokens": 128, "micro_batch_size": 8}
    found = plan("--config", write_recipe(make_shards(name="s"), data=data | {"batch_size_schedule": ramp}))
    assert (found["first_tokens_per_step"], found["tokens"]) == (32, 32 + 64 + 4 * 128)


def test_openai_s_weights_bring_their_shape(plan, write_recipe, make_shards):
    recipe = write_recipe(make_shards(), model={"config": None, "init_from": "gpt2-xl"}, data={"source": "stdlib"})
    args = ("--config", recipe, "--data.root", "absent", "--data.total_batch_tokens", 2048, "--micro_batch_size", 1)
    found = plan(*args)
    assert found["parameters"]["all"] == 1_557_611_200
    assert found["epochs"] is None


def test_an_optimizer_that_is_not_known_is_said(plan, write_recipe, make_shards):
    optimizer = {"class_path": "torch.optim.Adagrad", "init_args": {"lr": 0.1}}
    notes = plan("--config", write_recipe(make_shards(), model={"optimizer": optimizer}))["notes"]
    assert notes == ["the state of Adagrad is not known: it is taken as AdamW's"]


def test_the_text_says_that_the_mfu_is_assumed(capsys, write_recipe, make_shards):
    args = ["plan", "--config", str(write_recipe(make_shards())), "--gpu", "h100", "--mfu", "0.25"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "assuming an MFU of 25% of 989 TFLOP/s" in text
    assert "0.04 epochs of 20,000" in text
    assert "$" not in text


def test_bad_input_is_one_sentence(refused, write_recipe, make_shards):
    recipe = write_recipe(make_shards())
    args = ["plan", "--config", recipe]
    refused(["plan"], "no --config", "the recipes are", code=2)
    refused(["plan", "--config", "absent.yaml"], "absent.yaml", "does not exist", code=2)
    refused([*args, "--gpu", "h10"], "no GPU 'h10'", "h100", "24GB", code=2)
    refused([*args, "--gpus", "0"], "--gpus is 0", code=2)
    refused([*args, "--gpus", "two"], "--gpus", "two", code=2)
    refused([*args, "--mfu", "40"], "--mfu is 40", "such as 0.4", code=2)
    refused([*args, "--dollars_per_hour", "-1"], "--dollars_per_hour is -1", code=2)
    refused([*args, "--model.foo", "1"], "--model.foo", code=2)
    refused([*args, "--model.config.n_head", "3"], "n_head=3 does not divide n_embd=16", "set n_head to one of")
    refused([*args, "--gpus", "3"], "total_batch_tokens=128", "on 3 devices", "a multiple of 48")
    refused([*args, "--gpus", "4"], "micro-batches of 4", "set data.micro_batch_size to one of [1, 2]")
    refused([*args, "--trainer.max_steps", "-1"], "trainer.max_steps is not set")
    refused([*args, "--trainer.devices", "many"], "trainer.devices is many")
    refused([*args, "--trainer.precision", "transformer-engine"], "transformer-engine", "bf16-mixed")
    refused([*args, "--model.init_from", "absent.ckpt", "--model.config", "null"], "absent.ckpt", "give a path")
    auto = [*args, "--trainer.accelerator", "gpu", "--data.micro_batch_size", "auto"]
    refused(auto, "micro_batch_size is auto", "give --gpu")


def test_what_fit_would_refuse_is_not_planned(refused):
    args = ["plan", "--config", RECIPES / "gpt2_124m.yaml", "--gpu", "h100"]
    refused([*args, "--trainer.strategy", "fsdp"], "give fully_shard")
    refused([*args, "--trainer.num_nodes", "0"], "trainer.num_nodes is 0")
    refused([*args, "--trainer.num_nodes", "-1", "--gpus", "8"], "trainer.num_nodes is -1")
    refused([*args[:-1], "0GB"], "holds nothing", code=2)


def test_fp32_is_told_that_the_peak_is_bf16s(plan):
    found = plan("--config", RECIPES / "gpt2_124m.yaml", "--gpu", "h100", "--trainer.precision", "32-true")
    assert any("with TF32" in note for note in found["notes"])
    assert not plan("--config", RECIPES / "gpt2_124m.yaml", "--gpu", "h100")["notes"]
