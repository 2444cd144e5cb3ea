"""The learning rate of each step, to the last bit."""

import json
import math
from pathlib import Path

import pytest
import torch

from gpt2_lightning.schedule import WarmupCosine, warmup_cosine

GOLDEN = Path(__file__).parent / "data" / "golden_fp32" / "curve.json"


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


def test_without_warmup_it_starts_at_the_peak_and_without_a_decay_it_ends_at_the_floor():
    assert warmup_cosine(0, 1.0, 0.1, 0, 10) == 1.0
    assert warmup_cosine(5, 1.0, 0.1, 5, 5) == 0.1
    assert warmup_cosine(7, 1.0, 0.1, 5, math.inf) == 1.0


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
