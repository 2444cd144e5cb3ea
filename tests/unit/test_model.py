"""The network is causal, tied, and initialized as GPT-2. Parity with Hugging Face's GPT-2: test_weights.py."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.model import GPT, GPTConfig


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=24, vocab_size=101, n_layer=3, n_head=4, n_embd=32))


@settings(max_examples=25)
@given(T=st.integers(1, 24), layers=st.integers(1, 3), heads=st.integers(1, 3), data=st.data())
def test_a_logit_depends_on_every_token_up_to_its_own_and_on_no_later_one(T, layers, heads, data):
    torch.manual_seed(0)
    model = GPT(GPTConfig(24, 101, layers, heads, 8 * heads))
    t = data.draw(st.integers(0, T - 1))
    idx = torch.randint(0, 101, (2, T))
    changed = idx.clone()
    changed[:, t] = (idx[:, t] + data.draw(st.integers(1, 100))) % 101
    with torch.no_grad():
        before, after = model(idx), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(dim=-1).all()


def test_head_and_embedding_are_one_parameter(model):
    assert model.lm_head.weight is model.transformer["wte"].weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    model(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    # the head also gives a gradient to tokens that are not in the input
    assert model.transformer["wte"].weight.grad[1:].abs().sum() > 0


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [(12, 12, 768, 124439808), (24, 16, 1024, 354823168), (36, 20, 1280, 774030080), (48, 25, 1600, 1557611200)],
)
def test_the_four_published_sizes_have_their_parameter_counts(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        assert GPT(GPTConfig(1024, 50257, n_layer, n_head, n_embd)).num_parameters() == parameters


def test_flops_of_gpt2_124m_are_798m_per_token():
    with torch.device("meta"):
        assert GPT(GPTConfig()).flops_per_token() == 798_031_872


def test_initial_weights_have_the_statistics_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=4, n_embd=256))
    residual = 0.02 / math.sqrt(2 * 8)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            expected = residual if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(p.mean().item()) < 0.02 * expected, name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_head": 5, "n_embd": 32}, "n_head=5 does not divide n_embd=32"),
        ({"n_layer": 0}, "n_layer is 0: give a whole number of at least 1"),
        ({"n_head": None}, "n_head is None: give a whole number of at least 1"),
    ],
)
def test_impossible_sizes_are_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GPTConfig(**config)


def test_a_sequence_longer_than_block_size_is_refused(model):
    with pytest.raises(ValueError, match="a sequence of 25 tokens does not fit block_size=24"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_activation_checkpointing_changes_no_output_and_uses_the_mask(model):
    idx = torch.randint(0, 101, (1, 24))
    diagonal = torch.eye(24, dtype=torch.bool)  # each token attends to itself only
    masked, causal = model.hidden(idx, mask=diagonal), model.hidden(idx)
    model.activation_checkpointing = True
    assert torch.equal(model.hidden(idx, mask=diagonal), masked)
    assert torch.equal(model.hidden(idx), causal)
    assert not torch.allclose(masked, causal)
