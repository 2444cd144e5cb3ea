"""The learning rate of each step to the last bit, and the tokens of each step."""

import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.schedule import (
    BatchSizeSchedule,
    Stage,
    WarmupCosine,
    WarmupLinear,
    WarmupStableDecay,
    batch_size_stages,
    tokens_before,
    warmup_cosine,
    warmup_stable_decay,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden_fp32" / "curve.json"


def test_the_rates_are_build_nanogpts_doubles():
    curve = json.loads(GOLDEN.read_text())
    min_lr = curve["max_lr"] * 0.1  # as the script computes it: one ulp below the 6e-05 that the config states
    args = (curve["max_lr"], min_lr, curve["warmup_steps"], curve["max_steps"])
    assert [warmup_cosine(p["step"], *args) for p in curve["train"]] == [p["lr"] for p in curve["train"]]


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 6e-4 / 715),
        (714, 6e-4),
        (715, 6e-4),
        ((715 + 19073) // 2, 0.5 * (6e-4 + 6e-5)),
        (19073, 6e-5),
        (19074, 6e-5),
        (10**9, 6e-5),
    ],
)
def test_the_published_recipe(step, lr):
    assert warmup_cosine(step, 6e-4, 6e-5, 715, 19073) == pytest.approx(lr, rel=1e-12)


def _get_lr(it, max_lr, min_lr, warmup_steps, max_steps):
    """build-nanogpt's own lines."""
    # 1) linear warmup for warmup_iters steps
    if it < warmup_steps:
        return max_lr * (it + 1) / warmup_steps
    # 2) if it > lr_decay_iters, return min learning rate
    if it > max_steps:
        return min_lr
    # 3) in between, use cosine decay down to min learning rate
    decay_ratio = (it - warmup_steps) / (max_steps - warmup_steps)
    assert 0 <= decay_ratio <= 1
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # coeff starts at 1 and goes to 0
    return min_lr + coeff * (max_lr - min_lr)


RATES = st.floats(1e-6, 1.0)


@given(RATES, st.floats(0, 1), st.integers(0, 3000), st.integers(1, 30_000), st.integers(0, 40_000))
def test_any_cosine_is_build_nanogpts_to_the_last_bit(max_lr, part, warmup, decay, step):
    args = (max_lr, part * max_lr, warmup, warmup + decay)
    assert warmup_cosine(step, *args) == _get_lr(step, *args)


@given(RATES, st.floats(0, 1), st.integers(0, 300), st.integers(1, 500), st.integers(1, 500), st.integers(0, 2000))
def test_any_stable_decay_is_straight_between_its_corners(max_lr, part, warmup, stable, decay, step):
    """The corners: nothing before the first step, the peak at the warm-up's end and up to the decay, the floor."""
    end = warmup + stable + decay
    corners = [(-1, 0.0)] * (warmup > 0) + [(warmup - 1 + (warmup == 0), max_lr), (warmup + stable, max_lr)]
    steps, rates = zip(*corners, (end, part * max_lr), strict=True)
    expected = np.interp(step, steps, rates)
    # 1e-12: a few roundings of doubles
    assert warmup_stable_decay(step, max_lr, part * max_lr, warmup, decay, end) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=15)
@given(RATES, st.integers(2, 30), st.integers(2, 60))
def test_the_line_is_torchs_own(max_lr, warmup, decay):
    """LinearLR up, then LinearLR down, which multiply the rate step by step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=max_lr)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1)
    down = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, decay)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [warmup])
    expected = []
    for _ in range(warmup + decay):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = _rates(WarmupLinear, warmup + decay, lr=max_lr, warmup_steps=warmup, max_steps=warmup + decay)
    assert rates == pytest.approx(expected, rel=1e-9)  # up to 90 roundings of theirs


def test_without_warmup_it_starts_at_the_peak_and_without_a_decay_it_ends_at_the_floor():
    assert warmup_cosine(0, 1.0, 0.1, 0, 10) == 1.0
    assert warmup_cosine(5, 1.0, 0.1, 5, 5) == 0.1
    assert warmup_cosine(7, 1.0, 0.1, 5, math.inf) == 1.0


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 0.25), (3, 1.0), (4, 1.0), (15, 1.0), (16, 1.0), (17, 0.775), (18, 0.55), (19, 0.325), (20, 0.1), (21, 0.1)],
)
def test_warm_up_stable_decay(step, lr):
    assert warmup_stable_decay(step, 1.0, 0.1, 4, 4, 20) == pytest.approx(lr, rel=1e-12)


def test_a_decay_is_cut_by_the_warm_up_and_an_end_that_is_not_known_is_never_near():
    assert [warmup_stable_decay(s, 1.0, 0.0, 2, math.inf, 6) for s in range(7)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    assert warmup_stable_decay(10**6, 1.0, 0.0, 2, math.inf, math.inf) == 1.0
    assert warmup_stable_decay(3, 1.0, 0.0, 3, 0, 5) == 1.0  # no decay at all


def _rates(scheduler_class, steps, lr=2.0, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = scheduler_class(optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_classes_carry_their_functions():
    assert _rates(WarmupLinear, 6, warmup_steps=2, max_steps=6) == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    assert _rates(WarmupStableDecay, 6, warmup_steps=1, decay_steps=2, max_steps=6) == [2, 2, 2, 2, 2, 1]
    with pytest.raises(ValueError, match=r"decay_steps is -1: give 0 or more"):
        _rates(WarmupStableDecay, 1, decay_steps=-1)


def test_each_group_follows_its_own_peak():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 2.0}], lr=0.5)
    scheduler = WarmupCosine(optimizer, warmup_steps=2, max_steps=4, min_lr=0.0)
    rates = []
    for _ in range(6):
        rates += [group["lr"] for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5, 1.0, 1.0, 2.0, 1.0, 2.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0])


def test_a_decay_that_ends_before_the_warmup_is_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="lower warmup_steps or raise max_steps"):
        WarmupCosine(optimizer, warmup_steps=10, max_steps=5)


def test_the_batch_doubles_along_gpt3s_line():
    # from 2 tokens to 16 over 70: the line passes 4, 8 and 16 at 10, 30 and 70 tokens
    stages = batch_size_stages(16, BatchSizeSchedule(2, 70))
    assert stages == [(0, 0, 2), (5, 10, 4), (10, 30, 8), (15, 70, 16)]
    assert [tokens_before(s, stages) for s in (0, 1, 5, 6, 15, 17)] == [0, 2, 10, 14, 70, 102]
    assert batch_size_stages(16, None) == [(0, 0, 16)]
    assert tokens_before(1000, [Stage(0, 0, 16)]) == 16_000


def test_gpt3s_own_ramp():
    stages = batch_size_stages(524288, BatchSizeSchedule(32768, 4e9))
    assert [stage.step_tokens for stage in stages] == [32768, 65536, 131072, 262144, 524288]
    assert 4e9 <= stages[-1].first_token < 4e9 + 262144  # the full size from the first step after 4B tokens on


@given(st.integers(0, 5), st.integers(1, 64), st.integers(1, 2000))
def test_any_ramp_doubles_when_the_line_has_reached_the_next_doubling(doublings, start, ramp):
    total, token, sizes = start << doublings, 0, []
    while sizes[-1:] != [total]:
        line = start + Fraction((total - start) * token, ramp)  # from start at 0 to total at ramp
        sizes.append(max(start << k for k in range(doublings + 1) if k == 0 or line >= start << k))
        token += sizes[-1]
    stages = batch_size_stages(total, BatchSizeSchedule(start, ramp))
    assert [tokens_before(s, stages) for s in range(len(sizes) + 1)] == [0, *np.cumsum(sizes)]


@given(st.integers(0, 6), st.integers(1, 64), st.floats(1, 1e6))
def test_each_step_of_a_ramp_has_its_stages_tokens_and_never_shrinks(doublings, start, ramp):
    stages = batch_size_stages(start << doublings, BatchSizeSchedule(start, ramp))
    last = stages[-1].first_step
    steps = sorted({0, 1, last // 2, last - 1, last, last + 1} & set(range(last + 2)))
    sizes = [tokens_before(s + 1, stages) - tokens_before(s, stages) for s in steps]
    assert sizes == sorted(sizes)
    assert sizes[-1] == start << doublings
    assert set(sizes) <= {start << k for k in range(doublings + 1)}
    assert tokens_before(last, stages) >= ramp * (doublings > 0)


@pytest.mark.parametrize(
    ("start", "ramp", "part"),
    [
        (3, 10, "one of [16, 8, 4, 2, 1]"),
        (0, 10, "doubling"),
        (4, 0, "ramp_tokens is 0"),
        (None, 10, "needs start_tokens and ramp_tokens: give both"),
        (4, None, "needs start_tokens and ramp_tokens: give both"),
    ],
)
def test_a_ramp_that_leads_nowhere_is_refused(start, ramp, part):
    with pytest.raises(ValueError, match=re.escape(part)):
        batch_size_stages(16, BatchSizeSchedule(start, ramp))
