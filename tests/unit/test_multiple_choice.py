"""Packing and scoring of completions, and the scores made of them, without a model or a tokenizer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.evals.multiple_choice import Request, pack, token_losses
from gpt2_lightning.evals.scores import ExampleScore, Score, standard_error

tokens = st.lists(st.integers(0, 99), min_size=1, max_size=12).map(tuple)
requests = st.lists(
    st.builds(Request, tokens, st.lists(tokens, min_size=1, max_size=4).map(tuple)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(requests=requests, sequence_length=st.integers(1, 40), batch_tokens=st.integers(1, 200))
def test_each_scored_token_sees_only_its_context_and_its_completion_so_far(
    requests: list[Request], sequence_length: int, batch_tokens: int
) -> None:
    scored: dict[int, list[tuple[int, ...]]] = {}
    for batch in pack(requests, sequence_length, batch_tokens):
        B, T = batch.idx.shape
        assert B == 1 or batch_tokens >= B * T
        mask = batch.mask()
        assert mask.shape == (B, 1, T, T)
        assert mask.any(dim=3).all(), "a token that sees nothing has no softmax"
        at = iter(zip(batch.source.tolist(), batch.target.tolist(), strict=True))
        for i in batch.requests:
            assert i not in scored
            scored[i] = []
            for completion in requests[i].completions:
                seen_targets: list[int] = []
                for _ in completion:
                    source, target = next(at)
                    b, t = divmod(source, T)
                    visible = mask[b, 0, t].nonzero().squeeze(1)
                    assert batch.idx[b, visible].tolist() == [*requests[i].context, *seen_targets]
                    assert batch.positions[b, visible].tolist() == list(range(len(visible)))
                    seen_targets.append(target)
                scored[i].append(tuple(seen_targets))
        assert next(at, None) is None
    assert [scored[i] for i in range(len(requests))] == [list(q.completions) for q in requests]


def test_packing_makes_few_shapes_and_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60, (300,), generator=generator).tolist()
    packed = list(pack([Request((1,) * n, ((2, 3),) * 4) for n in [*sizes, 100, 200]], 64, 256))
    assert {batch.idx.shape[1] for batch in packed} == {64, 128, 256}
    assert len({batch.idx.shape for batch in packed}) <= 4  # one per length, and the last batch of 64
    used = sum(n + 4 for n in [*sizes, 100, 200])
    assert sum(batch.idx.numel() for batch in packed) < 1.1 * used


def test_token_losses_ignore_the_columns_beyond_the_vocabulary() -> None:
    (batch,) = pack([Request((5, 6), ((0, 2), (1,)))], 8, 8)
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def head(hidden: torch.Tensor) -> torch.Tensor:  # the hidden states are the logits; a padding column would win
        return torch.cat([hidden, torch.full((len(hidden), 1), 1e4)], dim=1)

    losses = token_losses(logits[None], head, batch, vocab_size=4)
    # 6, the context's last token, predicts the first token of both completions; 0, at position 2, predicts the 2
    expected = [-math.log(torch.softmax(logits[t].double(), 0)[token]) for t, token in ((1, 0), (2, 2), (1, 1))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_prediction_is_the_first_of_the_best_endings() -> None:
    score = ExampleScore(index=0, label=1, log_likelihoods=(-8.0, -9.0, -8.0, -20.0), lengths=(2, 3, 4, 10))
    assert score.per_length == (-4.0, -3.0, -2.0, -2.0)
    assert (score.prediction, score.prediction_norm) == (0, 2)
    assert ExampleScore(0, 1, (-1.0, -9.0, -9.5, -9.6), (0, 3, 3, 3)).prediction_norm == 1, "an empty ending never wins"


@pytest.mark.parametrize(("third", "expected"), [(-8.0, True), (-8.00001, True), (-8.1, False)])
def test_a_near_tie_is_a_relative_difference_below_1e_5(third: float, expected: bool) -> None:
    assert ExampleScore(0, 1, (-8.0, -9.0, third, -20.0), (2, 3, 4, 11)).is_near_tie == expected


def test_scores_of_ranks_add_up() -> None:
    examples = [ExampleScore(i, i % 4, (-1.0, -2.0, -3.0, -4.0), (1, 1, 3, 8)) for i in range(8)]
    assert Score.of(examples) == Score(n=8, correct=2, correct_norm=2)
    assert sum((Score.of(examples[rank::3]) for rank in range(3)), Score()) == Score.of(examples)
    score = Score(n=400, correct=100, correct_norm=120)
    assert (score.acc, score.acc_norm) == (0.25, 0.3)
    assert str(score) == "acc_norm 0.3000 ± 0.0229, acc 0.2500 (400 examples)"


def test_the_standard_error_is_that_of_lm_evaluation_harness() -> None:
    assert Score(400, 100, 120).stderr == pytest.approx(0.0229416, abs=1e-7)  # sqrt(0.3 · 0.7 / 399)
    errors = standard_error(np.array([0.3, 1.0, 0.5]), np.array([400, 400, 1]))
    assert errors == pytest.approx([0.0229416, 0, 0.5], abs=1e-7)
