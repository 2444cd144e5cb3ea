"""The chunked loss equals the plain one: same value and gradients, in fp32 and under bf16 autocast."""

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


def _plain(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight), targets)


def _with_gradients(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])  # 30: logits of several hundred, whose exp overflows
def test_chunked_equals_plain_for_small_and_huge_logits(chunk_tokens, scale):
    hidden, weight, targets = _inputs(scale=scale)
    plain = _with_gradients(_plain(hidden, weight, targets), hidden, weight)
    chunked = _with_gradients(LinearCrossEntropy(chunk_tokens)(hidden, weight, targets), hidden, weight)
    for a, b in zip(plain, chunked, strict=True):
        assert (b - a).norm() <= 1e-5 * a.norm()


@settings(max_examples=40)
@given(
    N=st.integers(1, 80), C=st.integers(1, 20), V=st.integers(1, 90), chunk=st.integers(1, 100), b=st.integers(1, 80)
)
def test_chunked_equals_plain_at_any_size_when_gradients_accumulate_over_micro_batches(N, C, V, chunk, b):
    hidden, weight, targets = _inputs(N, C, V)
    plain = _with_gradients(_plain(hidden, weight, targets), hidden, weight)
    b = next(size for size in range(min(b, N), 0, -1) if N % size == 0)
    criterion, losses = LinearCrossEntropy(chunk), []
    for h, t in zip(hidden.split(b), targets.split(b), strict=True):
        losses.append(criterion(h, weight, t))
        (losses[-1] * b / N).backward()
    found = sum(losses) * b / N, hidden.grad, weight.grad
    # relative to the terms of the sums: where they cancel, as with a single column, only their rounding is left
    terms = torch.ones(()), weight.norm() / N, hidden.norm() / N
    for a, f, t in zip(plain, found, terms, strict=True):
        assert (f - a).norm() <= 1e-5 * (a.norm() + t)


def test_chunked_under_bf16_autocast_is_as_close_to_fp32_as_the_plain_loss():
    hidden, weight, targets = _inputs(N=512)
    exact = _with_gradients(_plain(hidden, weight, targets), hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = _with_gradients(_plain(hidden, weight, targets), hidden, weight)
        chunked = _with_gradients(LinearCrossEntropy(100)(hidden, weight, targets), hidden, weight)
    for e, p, c in zip(exact, plain, chunked, strict=True):
        assert c.dtype == torch.float32
        assert 0 < (p - e).norm() < 0.02 * e.norm()  # above 0: it does run in bf16
        assert (c - e).norm() < 1.2 * (p - e).norm() + 1e-6 * e.norm()


def test_without_gradients_the_loss_is_the_same_and_needs_one_matmul():
    hidden, weight, targets = _inputs()
    matmuls: list[str] = []

    class RecordMatmuls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            matmuls.extend([str(func)] * ("mm" in str(func)))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        plain = _plain(hidden, weight, targets)
        with RecordMatmuls():
            loss = LinearCrossEntropy(len(hidden))(hidden, weight, targets)
    torch.testing.assert_close(loss, plain)
    assert matmuls == ["aten.mm.out"]


def test_one_loss_serves_calls_of_other_sizes_and_dtypes():
    criterion = LinearCrossEntropy(8)
    for N in (37, 5, 8):
        hidden, weight, targets = _inputs(N=N)
        torch.testing.assert_close(criterion(hidden, weight, targets), _plain(hidden, weight, targets))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion(hidden, weight, targets).dtype == torch.float32
        assert (criterion.logits.dtype, criterion.softmax_buffer.dtype) == (torch.bfloat16, torch.float32)
