"""Packing and scoring of completions, without a model or a tokenizer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.evals.multiple_choice import Question, RowScore, Score, completion_losses, pack, token_losses

tokens = st.lists(st.integers(0, 99), min_size=1, max_size=12).map(tuple)
questions = st.lists(
    st.builds(Question, tokens, st.lists(tokens, min_size=1, max_size=4).map(tuple)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(questions=questions, sequence_length=st.integers(1, 40), batch_tokens=st.integers(1, 200))
def test_every_scored_token_sees_its_context_and_what_came_before_it_and_nothing_else(
    questions: list[Question], sequence_length: int, batch_tokens: int
) -> None:
    scored: dict[int, list[tuple[int, ...]]] = {}
    for batch in pack(questions, sequence_length, batch_tokens):
        B, T = batch.idx.shape
        assert B == 1 or batch_tokens >= B * T
        mask = batch.mask()
        assert mask.shape == (B, 1, T, T)
        assert mask.any(dim=3).all(), "a token that sees nothing, not even itself, has no softmax"
        at = iter(zip(batch.source.tolist(), batch.target.tolist(), strict=True))
        for i in batch.questions:
            assert i not in scored
            scored[i] = []
            for completion in questions[i].completions:
                seen_targets: list[int] = []
                for _ in completion:
                    source, target = next(at)
                    b, t = divmod(source, T)
                    visible = mask[b, 0, t].nonzero().squeeze(1)
                    assert batch.idx[b, visible].tolist() == [*questions[i].context, *seen_targets]
                    assert batch.positions[b, visible].tolist() == list(range(len(visible)))
                    seen_targets.append(target)
                scored[i].append(tuple(seen_targets))
        assert next(at, None) is None
    assert [scored[i] for i in range(len(questions))] == [list(q.completions) for q in questions]


def test_an_evaluation_knows_few_shapes() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60, (300,), generator=generator).tolist()
    packed = list(pack([Question((1,) * n, ((2, 3),) * 4) for n in [*sizes, 100, 200]], 64, 256))
    assert {batch.idx.shape[1] for batch in packed} == {64, 128, 256}
    assert len({batch.idx.shape for batch in packed}) <= 4  # each length, and what is left of the last one's rows
    used = sum(n + 4 for n in [*sizes, 100, 200])
    assert sum(batch.idx.numel() for batch in packed) < 1.1 * used, "packing leaves little padding"


def test_token_losses_are_those_of_the_softmax_over_the_vocabulary_alone() -> None:
    (batch,) = pack([Question((5, 6), ((0, 2), (1,)))], 8, 8)
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    def head(
        rows: torch.Tensor,
    ) -> torch.Tensor:  # hidden states that are the logits, and a fifth column that would win
        return torch.cat([rows, torch.full((len(rows), 1), 1e4)], dim=1)

    losses = token_losses(logits[None], head, batch, vocab_size=4)
    # 6, the context's last token, predicts both first tokens; 0, at place 2, predicts the 2 after it
    expected = [-math.log(torch.softmax(logits[t].double(), 0)[token]) for t, token in ((1, 0), (2, 2), (1, 1))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert completion_losses(losses, [2, 1]) == pytest.approx([expected[0] + expected[1], expected[2]], rel=1e-6)


def test_the_two_winners_and_their_ties() -> None:
    row = RowScore(index=0, label=1, log_likelihoods=(-8.0, -9.0, -8.0, -20.0), lengths=(2, 3, 4, 10))
    assert row.per_length == (-4.0, -3.0, -2.0, -2.0)
    assert (row.prediction, row.prediction_norm) == (0, 2), "the first of equals"
    assert row.close
    assert not RowScore(0, 1, (-8.0, -9.0, -8.1, -20.0), (2, 3, 4, 11)).close
    assert RowScore(0, 1, (-8.0, -9.0, -8.00001, -20.0), (2, 3, 4, 11)).close
    assert RowScore(0, 1, (-1.0, -9.0, -9.5, -9.6), (0, 3, 3, 3)).prediction_norm == 1, "nothing over nothing"


def test_scores_add_up_as_integers() -> None:
    rows = [RowScore(i, i % 4, (-1.0, -2.0, -3.0, -4.0), (1, 1, 3, 8)) for i in range(8)]
    assert Score.of(rows) == Score(n=8, correct=2, correct_norm=2)
    assert sum((Score.of(rows[rank::3]) for rank in range(3)), Score()) == Score.of(rows)
    score = Score(n=400, correct=100, correct_norm=120)
    assert (score.acc, score.acc_norm) == (0.25, 0.3)
    assert score.stderr == pytest.approx(0.0229416, abs=1e-7)  # sqrt(0.3 · 0.7 / 399)
    assert str(score) == "acc_norm 0.3000 ± 0.0229, acc 0.2500 (400 rows)"
