"""The chunked loss is the plain one: same value, same gradients, in fp32 and under bf16 autocast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2_lightning.loss import LinearCrossEntropy


def _inputs(N=37, C=16, V=203, scale=1.0):
    torch.manual_seed(0)
    hidden = (scale * torch.randn(N, C)).requires_grad_()
    weight = torch.randn(V, C).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,))


def _gradients(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])  # 30: logits of several hundred, which overflow exp
def test_chunked_equals_plain_in_fp32(chunk_tokens, scale):
    hidden, weight, targets = _inputs(scale=scale)
    plain = _gradients(F.cross_entropy(F.linear(hidden, weight), targets), hidden, weight)
    chunked = _gradients(LinearCrossEntropy(chunk_tokens)(hidden, weight, targets), hidden, weight)
    for a, b in zip(plain, chunked, strict=True):
        assert (b - a).norm() <= 1e-5 * a.norm()


@settings(max_examples=40)
@given(
    N=st.integers(1, 80), C=st.integers(1, 20), V=st.integers(1, 90), chunk=st.integers(1, 100), b=st.integers(1, 80)
)
def test_chunked_equals_plain_at_any_size_and_over_any_micro_batches(N, C, V, chunk, b):
    """The mean of equal micro-batches' losses, whose gradients add up, is the loss of them all."""
    hidden, weight, targets = _inputs(N, C, V)
    plain = _gradients(F.cross_entropy(F.linear(hidden, weight), targets), hidden, weight)
    b = next(size for size in range(min(b, N), 0, -1) if N % size == 0)
    loss, losses = LinearCrossEntropy(chunk), []
    for h, t in zip(hidden.split(b), targets.split(b), strict=True):
        losses.append(loss(h, weight, t))
        (losses[-1] * b / N).backward()
    found = sum(losses) * b / N, hidden.grad, weight.grad
    # 1e-5 of what they are sums of: where the terms cancel, as with a single column, their rounding is all there is
    terms = torch.ones(()), weight.norm() / N, hidden.norm() / N
    for a, f, t in zip(plain, found, terms, strict=True):
        assert (f - a).norm() <= 1e-5 * (a.norm() + t)


def test_chunked_under_bf16_autocast_is_as_close_to_fp32_as_the_plain_one():
    hidden, weight, targets = _inputs(N=512)
    exact = _gradients(F.cross_entropy(F.linear(hidden, weight), targets), hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = _gradients(F.cross_entropy(F.linear(hidden, weight), targets), hidden, weight)
        chunked = _gradients(LinearCrossEntropy(100)(hidden, weight, targets), hidden, weight)
    for e, p, c in zip(exact, plain, chunked, strict=True):
        assert c.dtype == torch.float32
        assert 0 < (p - e).norm() < 0.02 * e.norm()  # bf16 it is
        assert (c - e).norm() < 1.2 * (p - e).norm() + 1e-6 * e.norm()


def test_gradient_is_scaled_by_what_comes_from_above():
    hidden, weight, targets = _inputs()
    once = torch.autograd.grad(LinearCrossEntropy(8)(hidden, weight, targets), (hidden, weight))
    quarter = torch.autograd.grad(LinearCrossEntropy(8)(hidden, weight, targets) / 4, (hidden, weight))
    for a, b in zip(once, quarter, strict=True):
        torch.testing.assert_close(b, a / 4)


def test_without_gradients_the_loss_is_the_same_and_only_the_logits_are_multiplied_out():
    hidden, weight, targets = _inputs()
    products: list[str] = []

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products.extend([str(func)] * ("mm" in str(func)))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        plain = F.cross_entropy(F.linear(hidden, weight), targets)
        with Listed():
            loss = LinearCrossEntropy(len(hidden))(hidden, weight, targets)
    torch.testing.assert_close(loss, plain)
    assert products == ["aten.mm.out"]


def test_the_buffers_follow_the_size_and_type_of_the_call():
    loss = LinearCrossEntropy(8)
    for N in (37, 5, 8):
        hidden, weight, targets = _inputs(N=N)
        torch.testing.assert_close(loss(hidden, weight, targets), F.cross_entropy(F.linear(hidden, weight), targets))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(hidden, weight, targets).dtype == torch.float32
        assert (loss.logits.dtype, loss.rows.dtype) == (torch.bfloat16, torch.float32)
