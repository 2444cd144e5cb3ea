"""Memory, parameters and FLOPs of a step: against literals, and against what PyTorch counts."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from gpt2_lightning.loss import LinearCrossEntropy, tokens_per_chunk
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.optim import AdamW, Muon, decay_groups
from gpt2_lightning.tools.memory import (
    StepSetup,
    activations_bytes,
    autocast_copies_bytes,
    count_parameters,
    flops_per_token,
    logits_bytes,
    memory,
    optimizer_bytes,
    recomputed_flops_per_token,
)
from gpt2_lightning.tools.plan import OPENAI_CONFIGS

ROOT = Path(__file__).parents[2]
FP32, BF16 = StepSetup(4, 4, cpu=True), StepSetup(4, 2, cpu=True)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_parameters_are_the_published_ones_and_the_networks(name, parameters):
    config = OPENAI_CONFIGS[name]
    with torch.device("meta"):
        model = GPT(config)
    decayed, others = (sum(p.numel() for p in group["params"]) for group in decay_groups(model.named_parameters()))
    assert count_parameters(config) == (decayed, others)
    assert decayed + others == parameters


def test_flops_per_token_of_gpt2_124m():
    assert flops_per_token(GPTConfig()) == 798_031_872
    # forward of the blocks: 2 · 12 · 12 · 768² for the weights, 2 · 12 · 768 · 1024 for causal attention
    assert recomputed_flops_per_token(GPTConfig()) == 169_869_312 + 18_874_368


def test_memory_of_the_videos_run():
    parts = memory(GPTConfig(), 64, StepSetup(4, 2, compiled=True, ddp=True))
    assert parts == {
        "weights": 497_903_616,  # 4 · 124,475,904
        "weights in 16 bits": 247_302_144,  # 2 · (84,934,656 + 82,944 biases + 38,633,472 of the head)
        "gradients": 497_903_616,
        "DDP's buckets": 497_903_616,
        "optimizer": 995_807_232,
        "activations": 22_097_166_336,  # 65,536 tokens · (12 · 27,712 + 4,632)
        "logits": 13_186_891_776,  # 65,536 · 50,304 · 2, and as much for their gradient
    }
    assert memory(GPTConfig(), 64, StepSetup(4, 2))["logits"] == 39_560_675_328  # 65,536 · 50,304 · 4 · 3


def test_chunked_logits_do_not_grow_with_the_micro_batch():
    step = StepSetup(4, 2, chunked_loss=True)
    one, two = (memory(GPTConfig(), b, step)["logits"] for b in (1, 2))
    assert two - one == 1024 * 768 * 4 * 2  # only the hidden states' gradients do
    # 512 rows in bf16 and in fp32, the head's gradient in fp32 and one chunk's in bf16, two for the hidden states
    assert one == 512 * 50304 * 6 + 38_633_472 * 6 + 6_291_456


def test_activation_checkpointing_keeps_only_the_input_of_each_block():
    step = StepSetup(4, 2, chunked_loss=True, activation_checkpointing=True)
    # per token: 12 inputs of 3,072 bytes, one whole block of 27,712, both ends 4,632
    assert memory(GPTConfig(), 1, step)["activations"] == 1024 * (36_864 + 27_712 + 4_632)
    whole = memory(GPTConfig(), 1, StepSetup(4, 2, activation_checkpointing=True))
    assert whole["activations"] == 1024 * (36_864 + 4_632)  # blocks are recomputed after the larger logits


def test_the_readmes_table_of_micro_batches_agrees_with_plan():
    text = (ROOT / "README.md").read_text() + "".join(path.read_text() for path in ROOT.glob("configs/*.md"))
    rows = re.findall(r"^\| (\d+) GB \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for gb, *largest in rows:
        for size, chunked, checkpointing in zip(largest, (0, 0, 1, 1), (0, 1, 0, 1), strict=True):
            step = StepSetup(
                4, 2, compiled=True, chunked_loss=bool(chunked), activation_checkpointing=bool(checkpointing)
            )
            one, two = (sum(memory(GPTConfig(), b, step).values()) for b in (int(size), 2 * int(size)))
            assert one <= 0.9 * 2**30 * int(gb) < two or size == "512"  # a step of 524,288 tokens


def test_optimizer_state_by_class_and_arguments():
    config, numbers = GPTConfig(), 124_475_904
    assert optimizer_bytes(config, StepSetup(optimizer="AdamW")) == 8 * numbers
    assert optimizer_bytes(config, StepSetup(optimizer="AdamW", optimizer_args={"amsgrad": True})) == 12 * numbers
    assert optimizer_bytes(config, StepSetup(optimizer="SGD", optimizer_args={"momentum": 0.0})) == 0
    assert optimizer_bytes(config, StepSetup(optimizer="SGD", optimizer_args={"momentum": 0.9})) == 4 * numbers
    assert optimizer_bytes(config, StepSetup(optimizer="Muon")) == 4 * 84_934_656 + 8 * (numbers - 84_934_656)


def test_sharding_divides_weights_gradients_and_optimizer_state():
    whole, shared = (memory(GPTConfig(), 1, StepSetup(4, 2, shards=n)) for n in (1, 8))
    for part in ("weights", "gradients", "optimizer"):
        assert shared[part] * 8 == whole[part]
    assert shared["gathered weights"] == 4 * (50304 * 768 + 1024 * 768 + 2 * 7_077_888)


@pytest.mark.parametrize("optimizer", [AdamW, Muon, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_optimizer_state_is_what_the_optimizer_allocates(optimizer):
    config = GPTConfig(16, 64, 2, 2, 32)
    model = GPT(config)
    made = optimizer(decay_groups(model.named_parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    made.step()
    kept = sum(t.nbytes for state in made.state.values() for t in state.values() if t is not None and t.dim() > 0)
    name, args = type(made).__name__, getattr(optimizer, "keywords", None)
    assert optimizer_bytes(config, StepSetup(optimizer=name, optimizer_args=args)) == kept


@contextmanager
def _saved(model: GPT) -> Iterator[dict[int, torch.Tensor]]:
    """Collects what autograd saves: one tensor per storage, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            found[t.untyped_storage().data_ptr()] = t  # keeps it alive, so that no address is reused
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
    assert logits_bytes(config, tokens, step) == 3 * logits  # saved once; backward allocates two more
    expected = sum(sizes.values()) - logits
    planned = activations_bytes(config, tokens, step) + autocast_copies_bytes(config, step)
    assert planned == pytest.approx(expected, rel=0.02)


def test_a_compiled_loss_saves_its_logits_in_16_bits():
    config = GPTConfig(64, 512, 1, 4, 64)
    model, ids = GPT(config), torch.randint(0, 512, (3, 65))
    # the compiler chooses what to save; this backend generates no code
    compiled = torch.compile(partial(_loss, model), dynamic=False, backend="aot_eager_decomp_partition")
    with _saved(model) as found, torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(ids)
    logits = [t for t in found.values() if t.shape == (192, 512)]
    assert [t.dtype for t in logits] == [torch.bfloat16]
    assert logits_bytes(config, 192, StepSetup(4, 2, compiled=True)) == 2 * logits[0].nbytes
    rest = sum(t.untyped_storage().nbytes() for t in found.values()) - logits[0].nbytes
    step = StepSetup(4, 2, compiled=True)
    assert activations_bytes(config, 192, step) + autocast_copies_bytes(config, step) == pytest.approx(rest, rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_sum_is_the_peak_of_a_step(bf16, chunked, checkpointing):
    """By PyTorch's memory tracker, with the gradients of an earlier micro-batch already allocated."""
    config = GPTConfig(128, 4096, 3, 4, 128)
    model = GPT(config)
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(decay_groups(model.named_parameters()), foreach=False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    criterion = LinearCrossEntropy(tokens_per_chunk(4096) if chunked else None)
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
    step = StepSetup(4, 2 if bf16 else 4, chunked_loss=chunked, activation_checkpointing=checkpointing, cpu=True)
    assert sum(memory(config, 8, step).values()) == pytest.approx(peak, rel=0.1 if chunked or checkpointing else 0.02)
