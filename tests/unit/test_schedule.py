"""The learning rate of each step, to the last bit, and the tokens of each step."""

import json
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
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


def test_cosine_gives_the_doubles_that_build_nanogpt_logged():
    curve = json.loads(GOLDEN.read_text())
    min_lr = curve["max_lr"] * 0.1  # as the script computes it: one ulp below the 6e-05 of our recipe
    args = (curve["max_lr"], min_lr, curve["warmup_steps"], curve["max_steps"])
    assert [warmup_cosine(p["step"], *args) for p in curve["train"]] == [p["lr"] for p in curve["train"]]


def _get_lr(it, max_lr, min_lr, warmup_steps, max_steps):
    """Copied from build-nanogpt."""
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
def test_cosine_equals_build_nanogpt_to_the_last_bit(max_lr, ratio, warmup, decay, step):
    args = (max_lr, ratio * max_lr, warmup, warmup + decay)
    assert warmup_cosine(step, *args) == _get_lr(step, *args)


def test_cosine_without_warmup_without_decay_and_without_end():
    assert warmup_cosine(0, 1.0, 0.1, 0, 10) == 1.0
    assert warmup_cosine(5, 1.0, 0.1, 5, 5) == 0.1
    assert warmup_cosine(7, 1.0, 0.1, 5, math.inf) == 1.0


@given(RATES, st.floats(0, 1), st.integers(0, 300), st.integers(1, 500), st.integers(1, 500), st.integers(0, 2000))
def test_stable_decay_is_linear_between_its_corners(max_lr, ratio, warmup, stable, decay, step):
    end = warmup + stable + decay
    corners = [(-1, 0.0)] * (warmup > 0) + [(warmup - 1 + (warmup == 0), max_lr), (warmup + stable, max_lr)]
    steps, rates = zip(*corners, (end, ratio * max_lr), strict=True)
    expected = np.interp(step, steps, rates)
    # 1e-12: a few roundings of doubles
    assert warmup_stable_decay(step, max_lr, ratio * max_lr, warmup, decay, end) == pytest.approx(expected, rel=1e-12)


def test_stable_decay_with_a_decay_longer_than_the_run_without_end_and_without_decay():
    assert [warmup_stable_decay(s, 1.0, 0.0, 2, math.inf, 6) for s in range(7)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    assert warmup_stable_decay(10**6, 1.0, 0.0, 2, math.inf, math.inf) == 1.0
    assert warmup_stable_decay(3, 1.0, 0.0, 3, 0, 5) == 1.0


def _scheduler(scheduler_class, lrs, **options):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    return scheduler_class(torch.optim.SGD(groups), **options)


@pytest.mark.parametrize(
    ("scheduler_class", "options", "expected"),
    [
        (WarmupCosine, {"max_steps": 4, "min_lr": 0.0}, [1.0, 2.0, 2.0, 1.0, 0.0, 0.0]),
        (WarmupLinear, {"max_steps": 6}, [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]),
        (WarmupStableDecay, {"decay_steps": 2, "max_steps": 6}, [1.0, 2.0, 2.0, 2.0, 2.0, 1.0]),
    ],
)
def test_each_class_applies_its_function_to_the_peak_of_each_group(scheduler_class, options, expected):
    scheduler = _scheduler(scheduler_class, [2.0, 1.0], warmup_steps=2, **options)
    rates = []
    for _ in expected:
        rates.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(np.outer(expected, [1.0, 0.5]))


def test_a_resumed_schedule_keeps_its_step_and_takes_the_new_settings():
    before = _scheduler(WarmupLinear, [2.0], warmup_steps=0, max_steps=4)
    before.optimizer.step()
    before.step()
    after = _scheduler(WarmupLinear, [1.0], warmup_steps=0, max_steps=2)
    after.load_state_dict(before.state_dict())
    assert after.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_lr": 2.0}, "min_lr is 2.0: give at least 0 and at most the optimizer's lr (1.0)"),
        ({"warmup_steps": 10, "max_steps": 5}, "lower warmup_steps or raise max_steps"),
    ],
)
def test_a_schedule_that_would_never_decay_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        _scheduler(WarmupCosine, [1.0, 0.5], **options)


def test_the_batch_doubles_along_the_line_of_gpt3():
    # from 2 tokens to 16 over 70: the line passes 4, 8 and 16 at 10, 30 and 70 tokens
    stages = batch_size_stages(16, BatchSizeSchedule(2, 70))
    assert stages == [(0, 0, 2), (5, 10, 4), (10, 30, 8), (15, 70, 16)]
    assert [tokens_before(s, stages) for s in (0, 1, 5, 6, 15, 17)] == [0, 2, 10, 14, 70, 102]
    assert batch_size_stages(16, None) == [(0, 0, 16)]
    assert tokens_before(1000, [Stage(0, 0, 16)]) == 16_000


def test_the_ramp_of_gpt3_reaches_the_full_size_at_4b_tokens():
    stages = batch_size_stages(524288, BatchSizeSchedule(32768, 4e9))
    assert [stage.step_tokens for stage in stages] == [32768, 65536, 131072, 262144, 524288]
    assert 4e9 <= stages[-1].first_token < 4e9 + 262144  # the first step after 4B tokens


@given(st.integers(0, 5), st.integers(1, 64), st.integers(1, 2000))
def test_any_ramp_doubles_when_the_line_reaches_the_next_doubling(doublings, start, ramp):
    total, token, sizes = start << doublings, 0, []
    while sizes[-1:] != [total]:
        line = start + Fraction((total - start) * token, ramp)  # from start at 0 to total at ramp
        sizes.append(max(start << k for k in range(doublings + 1) if k == 0 or line >= start << k))
        token += sizes[-1]
    stages = batch_size_stages(total, BatchSizeSchedule(start, ramp))
    assert [tokens_before(s, stages) for s in range(len(sizes) + 1)] == [0, *np.cumsum(sizes)]


@pytest.mark.parametrize("start", [0, 3, 32])
def test_a_ramp_that_does_not_double_up_to_the_full_size_is_refused_with_the_starts_that_do(start):
    with pytest.raises(ValueError, match=re.escape("one of [16, 8, 4, 2, 1]")):
        batch_size_stages(16, BatchSizeSchedule(start, 10))
