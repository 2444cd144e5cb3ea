"""The network: equal to HF's GPT-2, causal, tied, initialised as published."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gpt2_lightning.model import GPT, GPTConfig

TINY = GPTConfig(block_size=24, vocab_size=101, n_layer=3, n_head=4, n_embd=32)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(TINY)


@settings(max_examples=25)
@given(T=st.integers(1, 24), layers=st.integers(1, 3), heads=st.integers(1, 3), data=st.data())
def test_a_logit_depends_on_each_token_up_to_its_own_and_on_no_later_one(T, layers, heads, data):
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
    names = [name for name, _ in model.named_parameters()]
    assert "lm_head.weight" not in names
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    model(torch.zeros(1, 1, dtype=torch.long)).sum().backward()
    # the head's part of the gradient reaches rows whose token never came in
    assert model.transformer["wte"].weight.grad[1:].abs().sum() > 0


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [(12, 12, 768, 124439808), (24, 16, 1024, 354823168), (36, 20, 1280, 774030080), (48, 25, 1600, 1557611200)],
)
def test_parameter_counts_of_the_four_published_sizes(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(1024, 50257, n_layer, n_head, n_embd))
    assert model.num_parameters() == parameters


def test_initialisation_has_gpt2s_statistics():
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


def test_first_loss_is_that_of_a_uniform_guess(model):
    idx = torch.randint(0, 101, (8, 25))
    loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(101), abs=0.05)


def test_flops_of_gpt2_124m_are_798m_per_token():
    with torch.device("meta"):
        assert GPT(GPTConfig()).flops_per_token() == 798_031_872


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"n_head": 5, "n_embd": 32}, "n_head=5 does not divide n_embd=32: set n_head to one of [1, 2, 4, 8]"),
        ({"n_layer": 0}, "n_layer is 0: give a whole number of at least 1"),
        ({"n_head": None}, "n_head is None: give a whole number of at least 1"),
    ],
)
def test_impossible_shapes_are_refused(shape, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        GPTConfig(**shape)


@given(n_head=st.integers(1, 70), n_embd=st.integers(1, 70))
def test_heads_divide_the_width_or_those_that_do_are_told(n_head, n_embd):
    if n_embd % n_head == 0:
        assert GPT(GPTConfig(1, 1, 1, n_head, n_embd))(torch.zeros(1, 1, dtype=torch.long)).shape == (1, 1, 1)
        return
    with pytest.raises(ValueError, match=r"set n_head to one of \[.+\]") as error:
        GPTConfig(n_head=n_head, n_embd=n_embd)
    told = json.loads(str(error.value).partition("one of ")[2])
    divisors = [h for h in range(1, n_embd + 1) if n_embd % h == 0]
    assert told == sorted(set(told) & set(divisors))
    left = [h for h in divisors if h not in told]
    assert all(abs(h - n_head) >= max(abs(t - n_head) for t in told) for h in left), "the nearest"


def test_a_sequence_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="a sequence of 25 tokens does not fit block_size=24"):
        model(torch.zeros(1, 25, dtype=torch.long))


def test_a_mask_counts_with_activation_checkpointing_too(model):
    idx = torch.randint(0, model.config.vocab_size, (1, model.config.block_size))
    diagonal = torch.eye(model.config.block_size, dtype=torch.bool)  # each token sees itself alone
    plain, causal = model.hidden(idx, mask=diagonal), model.hidden(idx)
    model.activation_checkpointing = True
    assert torch.equal(model.hidden(idx, mask=diagonal), plain)
    assert not torch.allclose(plain, causal)
