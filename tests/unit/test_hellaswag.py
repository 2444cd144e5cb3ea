"""HellaSwag's two styles against independent computations, and reading its files. All examples here are our own."""

import itertools
import json
import threading
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from gpt2_lightning.errors import UserError
from gpt2_lightning.evals import hellaswag
from gpt2_lightning.evals.hellaswag import Example, ExampleSet, evaluate, load_examples, render, score_examples
from gpt2_lightning.evals.scores import Score
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tokenizer import get_tokenizer

# (activity_label, ctx_a, ctx_b), endings, and the query and choices that lm-evaluation-harness 0.4.13's process_docs
# makes of them: brackets, several spaces, non-ASCII, an empty ctx_b, equal endings, empty endings, an empty query
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
ODD_EXAMPLES = tuple(
    Example(f"{a} {b}".strip(), endings, label=i % 4, activity_label=label, ctx_a=a, ctx_b=b)
    for i, ((label, a, b), endings, _, _) in enumerate(ODD)
)
EXAMPLES = ExampleSet(load_examples("builtin").examples[::3] + ODD_EXAMPLES, "ours")


def make_model(block_size: int = 128, vocab_size: int = 50304) -> GPT:
    """Large weights, so that the endings' losses differ clearly. Padding columns would win every softmax."""
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
    """One sequence, all logits, no batch, no packing. The first tokens are cut if it is too long."""
    tokens = torch.tensor((context + ending)[-(block_size(logits) + 1) :])
    losses = F.cross_entropy(logits(tokens[None, :-1])[0, :, :50257], tokens[1:], reduction="none")
    return -losses[-len(ending) :].double().sum().item()


def block_size(logits: Any) -> int:
    return logits.config.n_positions if hasattr(logits.config, "n_positions") else logits.config.block_size


@pytest.mark.parametrize("size", [128, 36])  # 36: contexts are cut, to a different length for each ending
def test_nanogpt_style_is_the_plain_loop(size: int) -> None:
    model = make_model(size)
    encode = get_tokenizer().encode_ordinary
    scores = score_examples(model, EXAMPLES)
    cut = 0
    for score, example in zip(scores, EXAMPLES.examples, strict=True):
        context = encode(example.ctx)
        endings = [encode(" " + ending) for ending in example.endings]
        cut += any(len(context) + len(ending) > size + 1 for ending in endings)
        sums = [log_likelihood(model, context, ending) for ending in endings]
        means = [ll / len(ending) for ll, ending in zip(sums, endings, strict=True)]
        assert score.log_likelihoods == pytest.approx(sums, rel=1e-5)
        assert score.per_length == pytest.approx(means, rel=1e-5)
        assert (score.prediction, score.prediction_norm) == (sums.index(max(sums)), means.index(max(means)))
    assert (cut == 0) == (size == 128)
    assert Score.of(scores) == evaluate(model, EXAMPLES)
    assert len({score.prediction for score in scores}) == len({score.prediction_norm for score in scores}) == 4


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
    builtin = EXAMPLES.examples[: -len(ODD)]  # they have no markup to clean
    rendered = [(f"{e.activity_label}: {e.ctx_a} {(e.ctx_b or '').capitalize()}".strip(), e.endings) for e in builtin]
    rendered += [(query, choices) for _, _, query, choices in ODD]
    scores = score_examples(model, EXAMPLES, "harness")
    for score, (query, choices) in zip(scores, rendered, strict=True):
        sums = []
        for choice in choices:
            context = encode(query.rstrip()) or [50256]  # an empty query is <|endoftext|>
            whole = encode(f"{query} {choice}")
            sums.append(log_likelihood(logits, context, whole[len(encode(query.rstrip())) :]))
        pairs = zip(sums, choices, strict=True)
        per_character = [ll / len(choice) if choice else -float("inf") for ll, choice in pairs]
        assert score.log_likelihoods == pytest.approx(sums, rel=1e-5)
        assert score.prediction == sums.index(max(sums))
        assert score.prediction_norm == per_character.index(max(per_character))
    assert any(score.prediction != score.prediction_norm for score in scores)


PIECES = ["a", "He", "é漢🙂…", "'s", "12", "[step]", "[", "]", " [title]", ".", " ", "  ", "\n", "walks away"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
EXAMPLE = st.builds(
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
    examples=st.lists(EXAMPLE, min_size=1, max_size=5),
    style=st.sampled_from(["nanogpt", "harness"]),
    room=st.integers(0, 40),  # for the context, beside the longest ending
    world_size=st.integers(1, 4),
    batch_tokens=st.integers(1, 300),
)
def test_any_examples_in_any_batches_on_any_ranks_score_like_each_ending_alone(
    examples: list[Example], style: hellaswag.Style, room: int, world_size: int, batch_tokens: int
) -> None:
    encode = get_tokenizer().encode_ordinary
    encoded = []
    for example in examples:
        context, endings = render(example, style)
        if style == "nanogpt":
            encoded.append((encode(context), [encode(" " + ending) for ending in endings], None))
        else:
            start = encode(context.rstrip())
            wholes = [encode(f"{context} {ending}")[len(start) :] for ending in endings]
            encoded.append((start or [50256], wholes, [len(ending) for ending in endings]))
    size = max(len(ending) for _, endings, _ in encoded for ending in endings) + room
    torch.manual_seed(0)
    model = GPT(GPTConfig(size, 50304, 1, 2, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    expected = []
    for context, endings, characters in encoded:
        sums = [log_likelihood(model, context, ending) for ending in endings]
        lengths = characters or [len(ending) for ending in endings]
        means = [ll / n if n else -float("inf") for ll, n in zip(sums, lengths, strict=True)]
        expected.append((sums, sums.index(max(sums)), means.index(max(means))))
    found = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "batch_tokens": batch_tokens}
        found.append(score_examples(model, ExampleSet(tuple(examples), ""), style, **options))
        assert [score.index for score in found[-1]] == list(range(rank, len(examples), world_size))
    for score in (score for scores in found for score in scores):
        sums, prediction, prediction_norm = expected[score.index]
        assert score.log_likelihoods == pytest.approx(sums, rel=1e-5)  # fp32 in other shapes
        assert (score.prediction, score.prediction_norm) == (prediction, prediction_norm)
    labels = [example.label for example in examples]
    correct = sum(label == prediction for label, (_, prediction, _) in zip(labels, expected, strict=True))
    correct_norm = sum(label == prediction for label, (_, _, prediction) in zip(labels, expected, strict=True))
    assert sum(map(Score.of, found), Score()) == Score(len(examples), correct, correct_norm)


def test_harness_style_renders_like_process_docs() -> None:
    for example, (_, _, query, choices) in zip(ODD_EXAMPLES, ODD, strict=True):
        assert render(example, "harness") == (query, choices)
        assert render(example, "nanogpt") == (example.ctx, example.endings)


@pytest.mark.parametrize("style", ["nanogpt", "harness"])
def test_the_score_is_the_same_on_any_ranks_and_batches(model: GPT, style: hellaswag.Style) -> None:
    whole = evaluate(model, EXAMPLES, style)
    assert whole.n == len(EXAMPLES.examples)
    for world_size in (2, 3, 100):
        parts = [evaluate(model, EXAMPLES, style, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert sum(parts, Score()) == whole
        assert max(part.n for part in parts) - min(part.n for part in parts) <= 1, "no duplicates"
    assert evaluate(model, EXAMPLES, style, batch_tokens=1) == whole
    assert evaluate(model, EXAMPLES, style, batch_tokens=64 * 128) == whole


def test_a_compiled_model_gives_the_same_score(model: GPT) -> None:
    whole = evaluate(model, EXAMPLES)
    in_place = make_model()
    in_place.compile(backend="eager")
    assert evaluate(in_place, EXAMPLES) == whole
    assert evaluate(torch.compile(model, backend="eager"), EXAMPLES) == whole  # type: ignore[arg-type]


class _BatchDependent(GPT):
    """Rounds differently in each batch, as kernels may."""

    def hidden(self, idx: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = super().hidden(idx, *args, **kwargs)
        return x + 1e-4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(int(idx.sum())))


def test_near_ties_score_the_same_on_any_ranks_and_batches() -> None:
    model = _BatchDependent(make_model().config)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)  # all tokens are nearly equally likely
    whole = score_examples(model, EXAMPLES)
    assert all(score.is_near_tie for score in whole)
    assert score_examples(model, EXAMPLES, batch_tokens=1) == whole
    for world_size in (2, 3):
        found = [score_examples(model, EXAMPLES, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert sorted(itertools.chain(*found), key=lambda score: score.index) == whole


def test_the_first_of_equal_endings_wins(model: GPT) -> None:
    endings = ("is not here.", "went away.", "went away.", "is not here.")
    examples = ExampleSet(tuple(Example("It " + "really " * n, endings, 0) for n in range(9)), "")
    assert {score.prediction for score in score_examples(model, examples)} <= {0, 1}


def test_padding_columns_do_not_change_the_score(model: GPT) -> None:
    plain = make_model(vocab_size=50257)
    plain.load_state_dict({k: v[:50257] if v.size(0) == 50304 else v for k, v in model.state_dict().items()})
    ours, theirs = score_examples(model, EXAMPLES), score_examples(plain, EXAMPLES)
    for a, b in zip(ours, theirs, strict=True):
        assert a.log_likelihoods == pytest.approx(b.log_likelihoods, rel=1e-5)
    assert Score.of(ours) == Score.of(theirs)


def test_evaluation_leaves_the_model_unchanged(model: GPT) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for mode in (True, False):
        evaluate(model.train(mode), EXAMPLES)
        assert model.training == model.transformer["h"][0].training == mode
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_evaluation_follows_the_callers_autocast(model: GPT) -> None:
    exact = score_examples(model, EXAMPLES)
    with torch.autocast("cpu", torch.bfloat16):
        half = score_examples(model, EXAMPLES)
    assert any(a.log_likelihoods != b.log_likelihoods for a, b in zip(half, exact, strict=True))
    for a, b in zip(half, exact, strict=True):
        assert a.log_likelihoods == pytest.approx(b.log_likelihoods, rel=0.05)  # 8 bits of mantissa


def test_a_model_or_example_that_cannot_be_scored_is_refused(model: GPT) -> None:
    with pytest.raises(UserError, match=r"needs GPT-2's 50257 tokens, and this model's vocab_size is 50256"):
        evaluate(make_model(vocab_size=50256), EXAMPLES)
    with pytest.raises(UserError, match=r"example 1 has an ending of \d+ tokens, which does not fit block_size=8: "):
        evaluate(make_model(block_size=8), EXAMPLES)
    bare = ExampleSet((Example("It", ("a", "b", "c", "d"), 0),), "bare")
    assert evaluate(model, bare).n == 1
    with pytest.raises(UserError, match=r"harness style reads activity_label, ctx_a and ctx_b, which these .* lack"):
        evaluate(model, bare, "harness")


# -- reading -----------------------------------------------------------------------------------------------------------


def test_the_builtin_set_has_the_original_format_and_balanced_labels() -> None:
    path = files("gpt2_lightning") / "assets" / "hellaswag_builtin.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    fields = {"ind", "activity_label", "ctx_a", "ctx_b", "ctx", "split", "split_type", "label", "endings", "source_id"}
    assert len({record["ctx"] for record in records}) == len(records) == 48
    for i, record in enumerate(records):
        assert set(record) == fields
        assert (record["ind"], record["source_id"], record["split"]) == (i, f"builtin~{i}", "val")
        assert record["ctx"] == f"{record['ctx_a']} {record['ctx_b']}".strip()
        assert len(set(record["endings"])) == 4
    assert [sum(record["label"] == label for record in records) for label in range(4)] == [12] * 4
    examples = load_examples("builtin")
    assert (examples.tag, examples.note) == ("builtin, 48 examples", "")
    assert [example.label for example in examples.examples] == [record["label"] for record in records]


RECORD = {"ctx": "It", "endings": ["a", "b", "c", "d"], "label": 3}
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=50)
@given(
    texts=st.lists(UNICODE, min_size=5, max_size=5).filter(lambda texts: texts[0]),
    label=st.integers(0, 3),
    ctx_b=st.none() | UNICODE,
    end=st.sampled_from(["\n", "\r\n", "\n \t\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    ascii_only=st.booleans(),
)
def test_examples_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], label: int, ctx_b: str | None, end: str, encoding: str,
    ascii_only: bool,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("examples") / "mine.jsonl"
    records = [RECORD, {"ctx": texts[0], "endings": texts[1:], "label": str(label), "ctx_b": ctx_b, "extra": [1]}]
    content = end.join([*(json.dumps(record, ensure_ascii=ascii_only) for record in records), ""])
    path.write_bytes(content.encode(encoding))
    examples = load_examples(str(path))
    assert examples.examples == (
        Example("It", ("a", "b", "c", "d"), 3),
        Example(texts[0], tuple(texts[1:]), label, ctx_b=ctx_b),
    )
    assert (examples.tag, examples.note) == ("mine.jsonl, 2 examples", "")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1, 2]",
        json.dumps({"text": "hello"}),
        json.dumps({**RECORD, "ctx": ""}),
        json.dumps({**RECORD, "endings": ["a", "b", "c"]}),
        json.dumps({**RECORD, "endings": ["a", "b", "c", 4]}),
        json.dumps({**RECORD, "label": ""}),
        json.dumps({**RECORD, "label": 4}),
        "\udcff",
    ],
)
def test_a_file_in_another_format_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(f"{json.dumps(RECORD)}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(
        UserError, match=r"bad\.jsonl, line 2 is not a HellaSwag example .* expected a JSON object with ctx"
    ):
        load_examples(path)


def test_a_missing_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        load_examples("gone.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl is empty"):
        load_examples(tmp_path / "empty.jsonl")


# -- the hub -----------------------------------------------------------------------------------------------------------

HUB_FILE = "data/validation-00000-of-00001.parquet"


def write_split(path: Path) -> str:
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{**RECORD, "label": "1"}]), path)  # the hub's labels are strings
    return str(path)


def test_a_cached_split_is_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--Rowan--hellaswag"
    commit = "0" * 40
    write_split(repository / "snapshots" / commit / HUB_FILE)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hellaswag, "_hub_answers", lambda: pytest.fail("asked the hub"))
    examples = load_examples()
    assert (examples.tag, examples.note) == ("Rowan/hellaswag, 1 examples", "")
    assert examples.examples[0].label == 1


def test_a_hub_that_answers_is_downloaded_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, file: str, repo_type: str, local_files_only: bool = False) -> str:
        assert (name, file, repo_type) == ("Rowan/hellaswag", HUB_FILE, "dataset")
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        return write_split(tmp_path / "downloaded" / "split.parquet")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: None)
    assert load_examples().tag == "Rowan/hellaswag, 1 examples"


@pytest.mark.parametrize("answer", ["never", "refuses", "fails later"])
def test_without_a_working_hub_the_builtin_examples_are_used_at_once(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_of_test = threading.Event()

    def dataset_info(*args: Any, **kwargs: Any) -> None:
        if answer == "never":  # as getaddrinfo does with a name server that does not respond
            end_of_test.wait()
        elif answer == "refuses":
            raise ConnectionError

    def download(*args: Any, local_files_only: bool = False, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("not cached") if local_files_only else ConnectionError("reset by peer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(hellaswag, "_HUB_SECONDS", 0.05)
    started = time.monotonic()
    examples = load_examples()
    assert time.monotonic() - started < 5
    assert (examples.name, len(examples.examples)) == ("builtin", 48)
    assert "built-in examples" in examples.note
    end_of_test.set()
