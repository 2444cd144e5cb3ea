"""HellaSwag's two styles against independent computations, and the loading of its rows. All rows here are our own."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gpt2_lightning.evals import hellaswag
from gpt2_lightning.evals.hellaswag import Example, Examples, Score, evaluate, load_examples, render, score_rows
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tokenizer import get_tokenizer

# rows with brackets, double and triple spaces, non-ASCII, an empty ctx_b, equal endings, endings of which nothing is
# left, no query; and what lm-evaluation-harness 0.4.13's process_docs makes of them
ODD = [
    (
        ("Odd [header] label", "Take  two  spaces [title] and a   triple.", "[substeps] HE Walks"),
        ("goes [step] home.", "  padded  both  ends  ", "[title] all.", "naïve café — “quotes”"),
        "Odd label: Take two spaces. and a  triple. he walks",
        ("goes home.", "padded both ends", " all.", "naïve café — “quotes”"),
    ),
    (
        ("Brackets at the end", "The context ends in a bracket [header]", ""),
        ("[step]", "[a][b]", "stays", "  [only] "),
        "Brackets at the end: The context ends in a bracket ",
        ("", "", "stays", ""),
    ),
    (
        ("Alike", "Two endings are alike.", "she"),
        ("leaves the room.", "stays.", "leaves the  room.", "leaves the room."),
        "Alike: Two endings are alike. She",
        ("leaves the room.", "stays.", "leaves the room.", "leaves the room."),
    ),
    (
        ("Straße", "Er läuft über die Straße.", "ÉLAN vital"),
        ("日本語のテキスト。", "emoji 🙂🙃 end", "тест строки", "ﬁ ligature ß"),
        "Straße: Er läuft über die Straße. Élan vital",
        ("日本語のテキスト。", "emoji 🙂🙃 end", "тест строки", "ﬁ ligature ß"),
    ),
    (
        ("[nothing]", "[is]", "[left: of this]"),
        ("a", "b b", "c c c", "d d d d"),
        ": ",
        ("a", "b b", "c c c", "d d d d"),
    ),
    (
        ("Unclosed", "An [unclosed bracket", "he ] closes"),
        ("a [b", "c ] d", "[e] [f] g", "h"),
        "Unclosed: An closes",
        ("a [b", "c ] d", " g", "h"),
    ),
    (
        ("[all", "of it]", ""),
        ("goes.", "is gone.", "went.", "will go."),
        "",
        ("goes.", "is gone.", "went.", "will go."),
    ),
]
ODD_ROWS = tuple(
    Example(f"{a} {b}".strip(), endings, label=i % 4, activity_label=label, ctx_a=a, ctx_b=b)
    for i, ((label, a, b), endings, _, _) in enumerate(ODD)
)
EXAMPLES = Examples(load_examples("builtin").rows[::3] + ODD_ROWS, "ours")


def make_model(block_size: int = 128, vocab_size: int = 50304) -> GPT:
    """Weights so large that the endings' losses lie far apart; rows beyond the BPE's that would win every softmax."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25)
        model.lm_head.weight[50257:] *= 100
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model()


@torch.no_grad()
def log_likelihood(logits: Callable[[torch.Tensor], torch.Tensor], context: list[int], ending: list[int]) -> float:
    """The plain way: one sequence, all logits, no batch, no packing. Too long a one loses its first tokens."""
    window = torch.tensor((context + ending)[-(block_size(logits) + 1) :])
    losses = F.cross_entropy(logits(window[None, :-1])[0, :, :50257], window[1:], reduction="none")
    return -losses[-len(ending) :].double().sum().item()


def block_size(logits: Any) -> int:
    return logits.config.n_positions if hasattr(logits.config, "n_positions") else logits.config.block_size


@pytest.mark.parametrize("size", [128, 36])  # the second cuts contexts, each ending's its own length
def test_nanogpt_style_is_the_plain_loop(size: int) -> None:
    model = make_model(size)
    encode = get_tokenizer().encode_ordinary
    rows = score_rows(model, EXAMPLES)
    cut = 0
    for row, example in zip(rows, EXAMPLES.rows, strict=True):
        context = encode(example.ctx)
        endings = [encode(" " + ending) for ending in example.endings]
        cut += any(len(context) + len(ending) > size + 1 for ending in endings)
        sums = [log_likelihood(model, context, ending) for ending in endings]
        means = [ll / len(ending) for ll, ending in zip(sums, endings, strict=True)]
        assert row.log_likelihoods == pytest.approx(sums, rel=1e-5)
        assert row.per_length == pytest.approx(means, rel=1e-5)
        assert (row.prediction, row.prediction_norm) == (sums.index(max(sums)), means.index(max(means)))
    assert (cut == 0) == (size == 128)
    assert Score.of(rows) == evaluate(model, EXAMPLES)
    assert len({row.prediction for row in rows}) == len({row.prediction_norm for row in rows}) == 4
    assert any(row.prediction != row.prediction_norm for row in rows)


@pytest.mark.parametrize("size", [128, 36])
def test_harness_style_is_its_loop_over_transformers_gpt2(size: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = make_model(size, vocab_size=50257)
    theirs = GPT2LMHeadModel(GPT2Config(n_positions=size, n_layer=2, n_head=2, n_embd=32)).eval()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    theirs.load_state_dict({k: v.T if k.endswith(linear) else v for k, v in model.state_dict().items()})

    def logits(idx: torch.Tensor) -> torch.Tensor:
        return theirs(idx).logits

    logits.config = theirs.config  # type: ignore[attr-defined]
    encode = get_tokenizer().encode_ordinary
    worded = [
        (f"{e.activity_label}: {e.ctx_a} {(e.ctx_b or '').capitalize()}".strip(), e.endings)
        for e in EXAMPLES.rows[: -len(ODD)]  # nothing to clean in the built-in ones
    ] + [(query, choices) for _, _, query, choices in ODD]
    rows = score_rows(model, EXAMPLES, "harness")
    for row, (query, choices) in zip(rows, worded, strict=True):
        sums = []
        for choice in choices:
            context = encode(query.rstrip()) or [50256]  # it scores an empty query after <|endoftext|>
            whole = encode(f"{query} {choice}")
            sums.append(log_likelihood(logits, context, whole[len(encode(query.rstrip())) :]))
        pairs = zip(sums, choices, strict=True)
        per_character = [ll / len(choice) if choice else -float("inf") for ll, choice in pairs]
        assert row.log_likelihoods == pytest.approx(sums, rel=1e-5)
        assert row.prediction == sums.index(max(sums))
        assert row.prediction_norm == per_character.index(max(per_character))
    assert any(row.prediction != row.prediction_norm for row in rows)


PIECES = (
    "a",
    "He",
    "é",
    "漢",
    "🙂",
    "'s",
    "12",
    "[step]",
    "[",
    "]",
    " [title]",
    ".",
    " ",
    "  ",
    "\n",
    "walks away",
    "…",
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
ROWS = st.builds(
    Example,
    TEXTS.filter(bool),
    st.lists(TEXTS, min_size=4, max_size=4).map(tuple)
    | st.lists(TEXTS, min_size=2, max_size=2).map(lambda t: (*t, *t)),
    st.integers(0, 3),
    TEXTS,
    TEXTS,
    TEXTS,
)


@settings(max_examples=15)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=5),
    style=st.sampled_from(["nanogpt", "harness"]),
    room=st.integers(0, 40),
    world_size=st.integers(1, 4),
    batch_tokens=st.integers(1, 300),
)
def test_any_rows_in_any_batches_on_any_ranks_score_as_each_ending_does_alone(
    rows: list[Example], style: hellaswag.Style, room: int, world_size: int, batch_tokens: int
) -> None:
    """``room``: of the context, beside the longest ending; what does not fit loses its beginning."""
    encode = get_tokenizer().encode_ordinary
    plans = []
    for row in rows:
        context, endings = render(row, style)
        if style == "nanogpt":
            plans.append((encode(context), [encode(" " + ending) for ending in endings], None))
        else:
            start = encode(context.rstrip())
            wholes = [encode(f"{context} {ending}")[len(start) :] for ending in endings]
            plans.append((start or [50256], wholes, [len(ending) for ending in endings]))
    size = max(len(ending) for _, endings, _ in plans for ending in endings) + room
    torch.manual_seed(0)
    model = GPT(GPTConfig(size, 50304, 1, 2, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    expected = []
    for context, endings, characters in plans:
        sums = [log_likelihood(model, context, ending) for ending in endings]
        lengths = characters or [len(ending) for ending in endings]
        means = [ll / n if n else -float("inf") for ll, n in zip(sums, lengths, strict=True)]
        expected.append((sums, sums.index(max(sums)), means.index(max(means))))
    examples, score = Examples(tuple(rows), ""), Score()
    for rank in range(world_size):
        found = score_rows(model, examples, style, rank=rank, world_size=world_size, batch_tokens=batch_tokens)
        assert [row.index for row in found] == list(range(rank, len(rows), world_size))
        for row in found:
            sums, prediction, prediction_norm = expected[row.index]
            assert row.log_likelihoods == pytest.approx(sums, rel=1e-5)  # fp32 over other shapes
            assert (row.prediction, row.prediction_norm) == (prediction, prediction_norm)
        score += Score.of(found)
    right = [(p == row.label, n == row.label) for row, (_, p, n) in zip(rows, expected, strict=True)]
    assert score == Score(len(rows), sum(p for p, _ in right), sum(n for _, n in right))


def test_harness_words_a_row_as_its_process_docs_does() -> None:
    for example, (_, _, query, choices) in zip(ODD_ROWS, ODD, strict=True):
        assert render(example, "harness") == (query, choices)
        assert render(example, "nanogpt") == (example.ctx, example.endings)


@pytest.mark.parametrize("style", ["nanogpt", "harness"])
def test_the_same_integers_on_any_ranks_in_any_batch(model: GPT, style: hellaswag.Style) -> None:
    whole = evaluate(model, EXAMPLES, style)
    assert whole.n == len(EXAMPLES.rows)
    for world_size in (2, 3, 100):
        parts = [evaluate(model, EXAMPLES, style, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert sum(parts, Score()) == whole
        assert max(part.n for part in parts) - min(part.n for part in parts) <= 1, "no padding"
    assert evaluate(model, EXAMPLES, style, batch_tokens=1) == whole
    assert evaluate(model, EXAMPLES, style, batch_tokens=64 * 128) == whole


def test_the_same_integers_from_a_compiled_model(model: GPT) -> None:
    whole = evaluate(model, EXAMPLES)
    in_place = make_model()
    in_place.compile(backend="eager")
    assert evaluate(in_place, EXAMPLES) == whole
    assert evaluate(torch.compile(model, backend="eager"), EXAMPLES) == whole  # type: ignore[arg-type]


class _Noisy(GPT):
    """Rounds otherwise in a large batch than alone, as kernels do."""

    def hidden(self, idx: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = super().hidden(idx, *args, **kwargs)
        return x + 1e-4 * torch.randn_like(x) if idx.size(1) > 256 else x


def test_a_row_that_rounding_would_decide_is_scored_alone() -> None:
    model = _Noisy(make_model().config)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)  # all tokens nearly equal: every row is close
    alone = score_rows(model, EXAMPLES, batch_tokens=1)
    assert all(row.close for row in alone)
    assert score_rows(model, EXAMPLES) == alone


class _ByCompany(GPT):
    """Rounds by all that is in its batch, as kernels may."""

    def hidden(self, idx: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = super().hidden(idx, *args, **kwargs)
        return x + 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(int(idx.sum())))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_row_scored_alone_has_no_company_on_any_number_of_ranks(world_size: int) -> None:
    model = _ByCompany(make_model().config)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    whole = score_rows(model, EXAMPLES)
    assert all(row.close for row in whole)
    dealt = [score_rows(model, EXAMPLES, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted((row for rows in dealt for row in rows), key=lambda row: row.index) == whole


def test_the_first_of_equal_endings_wins(model: GPT) -> None:
    endings = ("is not here.", "went away.", "went away.", "is not here.")
    examples = Examples(tuple(Example("It " + "really " * n, endings, 0) for n in range(9)), "")
    predictions = {row.prediction for row in score_rows(model, examples)}
    assert predictions <= {0, 1}


def test_columns_beyond_the_bpe_do_not_count(model: GPT) -> None:
    plain = make_model(vocab_size=50257)
    plain.load_state_dict({k: v[:50257] if v.size(0) == 50304 else v for k, v in model.state_dict().items()})
    ours, theirs = score_rows(model, EXAMPLES), score_rows(plain, EXAMPLES)
    for a, b in zip(ours, theirs, strict=True):
        assert a.log_likelihoods == pytest.approx(b.log_likelihoods, rel=1e-5)
    assert Score.of(ours) == Score.of(theirs)


def test_the_model_comes_back_as_it_was(model: GPT) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for mode in (True, False):
        evaluate(model.train(mode), EXAMPLES)
        assert model.training == model.transformer["h"][0].training == mode
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(_Broken(model.config).train(), EXAMPLES)
    assert _Broken.last is not None
    assert _Broken.last.training


class _Broken(GPT):
    last: "GPT | None" = None

    def hidden(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert not self.training
        type(self).last = self
        raise RuntimeError("broken")


def test_it_scores_under_autocast(model: GPT) -> None:
    exact = score_rows(model, EXAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        half = score_rows(model, EXAMPLES)
    assert any(a.log_likelihoods != b.log_likelihoods for a, b in zip(half, exact, strict=True))
    for a, b in zip(half, exact, strict=True):
        assert a.log_likelihoods == pytest.approx(b.log_likelihoods, rel=0.05)  # 8 bits of mantissa


def test_what_a_model_cannot_score_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match=r"needs GPT-2's 50257 tokens, and this model's vocab_size is 50256"):
        evaluate(make_model(vocab_size=50256), EXAMPLES)
    with pytest.raises(ValueError, match=r"row 1 has an ending of \d+ tokens, which does not fit block_size=8: "):
        evaluate(make_model(block_size=8), EXAMPLES)
    with pytest.raises(ValueError, match="no style 'nanoGPT': take one of nanogpt, harness"):
        evaluate(model, EXAMPLES, "nanoGPT")  # type: ignore[arg-type]
    bare = Examples((Example("It", ("a", "b", "c", "d"), 0),), "bare")
    assert evaluate(model, bare).n == 1
    with pytest.raises(ValueError, match=r"harness style reads activity_label, ctx_a and ctx_b, which these .* lack"):
        evaluate(model, bare, "harness")


def test_the_builtin_set_is_hellaswag_in_its_original_format() -> None:
    from importlib.resources import files

    path = files("gpt2_lightning") / "assets" / "hellaswag_builtin.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    fields = {"ind", "activity_label", "ctx_a", "ctx_b", "ctx", "split", "split_type", "label", "endings", "source_id"}
    assert len(rows) == 48
    for i, row in enumerate(rows):
        assert set(row) == fields
        assert (row["ind"], row["source_id"], row["split"]) == (i, f"builtin~{i}", "val")
        assert row["ctx"] == f"{row['ctx_a']} {row['ctx_b']}".strip()
        assert len(set(row["endings"])) == 4
    assert [sum(row["label"] == label for row in rows) for label in range(4)] == [12] * 4
    assert 0 < sum(row["ctx_b"] == "" for row in rows) < 24
    assert len({row["ctx"] for row in rows}) == 48
    examples = load_examples("builtin")
    assert (examples.tag, examples.note) == ("builtin, 48 rows", "")
    assert [example.label for example in examples.rows] == [row["label"] for row in rows]


ROW = {"ctx": "It", "endings": ["a", "b", "c", "d"], "label": 3}


def test_a_local_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    separator = {**ROW, "ctx": "two\u2028lines", "label": "2", "ctx_b": "", "extra": [1]}
    path.write_text("\n".join([json.dumps(ROW), "", json.dumps(separator, ensure_ascii=False), ""]), encoding="utf-8")
    examples = load_examples(path)
    assert examples == load_examples(str(path))
    assert examples.rows == (
        Example("It", ("a", "b", "c", "d"), 3),
        Example("two\u2028lines", ("a", "b", "c", "d"), 2, ctx_b=""),
    )
    assert (examples.tag, examples.note) == ("mine.jsonl, 2 rows", "")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROW), encoding="utf-8-sig")
    assert load_examples(tmp_path / "mine.jsonl").rows == (Example("It", ("a", "b", "c", "d"), 3),)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"line 2 is not HellaSwag: not JSON"),
        ("[1, 2]", r"line 2 is not HellaSwag: expected a JSON object"),
        (json.dumps({"text": "hello"}), r"line 2 is not HellaSwag: it lacks ctx, endings, label"),
        (json.dumps({**ROW, "ctx": ""}), r"line 2 is not HellaSwag: ctx must be"),
        (json.dumps({**ROW, "endings": ["a", "b", "c"]}), r"line 2 is not HellaSwag: endings must be"),
        (json.dumps({**ROW, "endings": ["a", "b", "c", 4]}), r"line 2 is not HellaSwag: endings must be"),
        (json.dumps({**ROW, "ctx_b": 7}), r"line 2 is not HellaSwag: ctx_b must be text"),
        (json.dumps({**ROW, "label": 4}), r"line 2: label is 4, and must be 0, 1, 2 or 3"),
        (json.dumps({**ROW, "label": -1}), r"line 2: label is -1, and must be 0, 1, 2 or 3"),
        (json.dumps({**ROW, "label": ""}), r"line 2: label is '', and must be 0, 1, 2 or 3"),
    ],
)
def test_a_file_that_is_not_hellaswag_is_named_with_its_line(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n{line}\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, {sentence}") as error:
        load_examples(path)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl: no such file"):
        load_examples("gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows"):
        load_examples(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n\x93NUMPY\n\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.jsonl, line 2 is not HellaSwag: not text in UTF-8"):
        load_examples(tmp_path / "binary.jsonl")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any], Callable[..., Any]], None]:
    import datasets
    import huggingface_hub

    def install(ask: Callable[..., Any], load: Callable[..., Any]) -> None:
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    return install


def test_without_a_path_the_hub_is_asked(hub: Callable[..., None]) -> None:
    import datasets

    def load(name: str, split: str) -> list[dict[str, Any]]:
        assert (name, split, datasets.config.HF_HUB_OFFLINE) == ("Rowan/hellaswag", "validation", False)
        return [{**ROW, "label": "1"}]  # the hub's labels are strings

    hub(lambda *args, **kwargs: None, load)
    examples = load_examples()
    assert (examples.tag, examples.note) == ("Rowan/hellaswag, 1 rows", "")
    assert examples.rows[0].label == 1


def test_a_hub_that_does_not_answer_is_not_waited_for(
    hub: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    hangs = threading.Event()
    cached: list[dict[str, Any]] = []

    def load(name: str, split: str) -> list[dict[str, Any]]:
        assert datasets.config.HF_HUB_OFFLINE, "load_dataset on its own would retry for half a minute"
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        if not cached:
            raise ConnectionError("offline, and not in the cache")
        return cached

    hub(lambda *args, **kwargs: hangs.wait(), load)
    monkeypatch.setattr(hellaswag, "_HUB_SECONDS", 0.05)
    examples = load_examples(None)
    assert (examples.name, len(examples.rows)) == ("builtin", 48)
    assert "built-in questions" in examples.note
    assert "\n" not in examples.note
    cached.append(ROW)
    assert load_examples(None).tag == "Rowan/hellaswag, 1 rows"
    assert not datasets.config.HF_HUB_OFFLINE
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    hangs.set()
