"""Generation: filters on literals; the cache, the batch and the window change the speed, never the text."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, TopKLogitsWarper, TopPLogitsWarper

from gpt2_lightning import GPT, GPTConfig
from gpt2_lightning.checkpoints.hf import from_hf
from gpt2_lightning.generate import (
    KVCache,
    TextStream,
    filter_top_k,
    filter_top_p,
    generate,
    pick,
    window_start,
)
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer

INF = float("inf")


def random_gpt(block_size: int = 16, vocab_size: int = 97, n_layer: int = 3, n_head: int = 2, n_embd: int = 12) -> GPT:
    """Blocks that outweigh the embedding: a text that depends on all before it, and does not repeat one token."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model.lm_head.weight.mul_(0.3)
    return model


def constant_gpt(logits: Tensor) -> GPT:
    """A model whose logits are these, whatever it reads."""
    model = GPT(GPTConfig(block_size=8, vocab_size=len(logits), n_layer=1, n_head=1, n_embd=2)).eval()
    with torch.no_grad():
        model.transformer.get_parameter("ln_f.weight").zero_()
        model.transformer.get_parameter("ln_f.bias").copy_(torch.tensor([1.0, 0.0]))
        model.lm_head.weight[:, 0] = logits
    return model


PROMPTS = [[1, 2, 3], [4], list(range(16)), [9] * 11, [50, 60]]


# ---- pure functions, on literals


def test_filter_top_k_keeps_exactly_the_k_largest() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [-1.0, -2.0, 0.5, -3.0]])
    assert filter_top_k(logits, 2).tolist() == [[-INF, 4.0, -INF, 3.0], [-1.0, -INF, 0.5, -INF]]
    assert filter_top_k(logits, 9).tolist() == logits.tolist()
    assert filter_top_k(torch.zeros(1, 5), 2).isfinite().sum() == 2  # equals: still two


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.01, [0]),
        (0.49, [0]),
        (0.51, [0, 3]),
        (0.74, [0, 3]),
        (0.76, [0, 2, 3]),
        (0.99, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_filter_top_p_keeps_the_fewest_that_reach_p(p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([[0.5, 0.1, 0.15, 0.25]])
    filtered = filter_top_p(probabilities.log(), p)
    assert filtered.isfinite().nonzero()[:, 1].tolist() == kept
    assert torch.equal(filtered[:, kept], probabilities.log()[:, kept])


SEEDS = st.integers(0, 2**32 - 1)


def drawn_logits(seed: int, rows: int, columns: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=50)
@given(SEEDS, st.integers(1, 4), st.integers(1, 60), st.floats(0.01, 30), st.integers(1, 80), st.floats(0.01, 0.999))
def test_the_filters_are_transformers_own(seed: int, rows: int, columns: int, scale: float, k: int, p: float) -> None:
    logits = drawn_logits(seed, rows, columns, scale)
    nothing: Any = None  # its filters do not look at the ids
    assert torch.equal(filter_top_k(logits, k), TopKLogitsWarper(k)(nothing, logits))
    assert torch.equal(filter_top_p(logits, p), TopPLogitsWarper(p)(nothing, logits))


@settings(max_examples=50)
@given(SEEDS, st.integers(1, 30), st.sampled_from([0.0, 1 - 2**-24]) | st.floats(0, 1 - 2**-24, width=32), st.data())
def test_no_draw_picks_a_column_that_was_filtered(seed: int, columns: int, u: float, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.integers(0, columns - 1), min_size=1))
    logits = drawn_logits(seed, 1, columns, 20.0)
    logits[:, [column for column in range(columns) if column not in kept]] = -INF
    assert int(pick(logits, torch.tensor([u]))) in kept


@pytest.mark.parametrize("p", [1e-45, 1e-9])
def test_filter_top_p_always_leaves_the_likeliest(p: float) -> None:
    assert filter_top_p(torch.tensor([[0.0, 3.0, 1.0]]), p).tolist() == [[-INF, 3.0, -INF]]


@pytest.mark.parametrize(
    ("u", "column"), [(0.0, 1), (0.24, 1), (0.26, 2), (0.74, 2), (0.76, 4), (1 - 2**-24, 4)]
)  # 1 - 2^-24: the largest that torch.rand gives
def test_pick_inverts_the_distribution_and_skips_what_is_filtered(u: float, column: int) -> None:
    logits = torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]]).log()
    assert pick(logits, torch.tensor([u])).tolist() == [column]


@pytest.mark.parametrize(
    ("block_size", "starts"),
    [
        (8, [0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12]),
        (5, [0, 0, 0, 0, 0, 3, 3, 3, 6, 6, 6, 9]),
        (1, [0, 1, 2, 3]),
    ],
)
def test_window_start_hops_by_half_the_context(block_size: int, starts: list[int]) -> None:
    assert [window_start(length, block_size) for length in range(1, len(starts) + 1)] == starts


@given(st.integers(1, 10_000), st.integers(1, 2_000))
def test_window_is_never_empty_nor_longer_than_the_context(length: int, block_size: int) -> None:
    seen = length - window_start(length, block_size)
    assert 1 <= seen <= block_size
    assert seen == length or seen > block_size // 2  # never less than half the context once the text exceeds it


def test_cache_appends_into_memory_allocated_once() -> None:
    cache = KVCache(capacity=3)
    k, v = cache.update(torch.ones(1, 1, 2, 1), torch.full((1, 1, 2, 1), 5.0))
    memory = k.data_ptr()
    k, v = cache.update(torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 6.0))
    assert (k.flatten().tolist(), v.flatten().tolist()) == ([1.0, 1.0, 2.0], [5.0, 5.0, 6.0])
    assert k.data_ptr() == memory


# ---- the text


def test_greedy_text_equals_transformers_for_100_tokens_on_5_prompts() -> None:
    shape = {"n_positions": 128, "vocab_size": VOCAB_SIZE, "n_layer": 3, "n_head": 2, "n_embd": 16}
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # not as some version of transformers happens to draw them
            p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.3)
    ours = GPT(GPTConfig(128, VOCAB_SIZE, 3, 2, 16))
    ours.load_state_dict(from_hf(theirs.state_dict()), strict=False)
    tokenizer = get_tokenizer()
    prompts = ["Hello, I'm a language model,", "\n", "def f(x):", "漢字 and 😀", "The capital of France is"]
    prompts_ids = [tokenizer.encode_ordinary(prompt) for prompt in prompts]
    together = generate(ours, prompts_ids, 100, top_k=1, stop=None)
    for ids, text in zip(prompts_ids, together, strict=True):
        expected = theirs.generate(
            torch.tensor([ids]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert len(set(expected[0, len(ids) :].tolist())) > 5, "a text that repeats one token proves little"
        assert text == expected[0].tolist()
        assert generate(ours, torch.tensor([ids]), 100, top_k=1, stop=None).tolist() == expected.tolist()


def plain_text(
    model: GPT, prompt: Sequence[int], n: int, seed: int, temperature: float, top_k: int | None, top_p: float, stop: int
) -> list[int]:
    """One text alone, without a cache, in Python's numbers; it ends before ``stop``."""
    generator, block_size, row = torch.Generator().manual_seed(seed), model.config.block_size, list(prompt)
    for _ in range(n):
        start = 0
        while len(row) - start > block_size:
            start += (block_size + 1) // 2
        with torch.no_grad():
            logits = [x / temperature for x in model(torch.tensor([row[start:]]))[0, -1, :VOCAB_SIZE].tolist()]
        order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
        weights = {token: math.exp(logits[token] - logits[order[0]]) for token in order}
        total, nucleus, mass = sum(weights.values()), [], 0.0
        for token in order:
            if mass < top_p:
                nucleus.append(token)
            mass += weights[token] / total
        u, cumulated, token = float(torch.rand(1, generator=generator)), 0.0, -1
        for token in sorted(nucleus):
            cumulated += weights[token]
            if cumulated > u * sum(weights[t] for t in nucleus):
                break
        if token == stop:
            break
        row.append(token)
    return row


@settings(max_examples=30)
@given(data=st.data())
def test_any_text_is_that_of_a_plain_loop_with_and_without_the_cache(data: st.DataObject) -> None:
    draw = data.draw
    heads, block_size = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    model = random_gpt(block_size, draw(st.integers(20, 90)), draw(st.integers(1, 3)), heads, 6 * heads)
    prompt = st.lists(st.integers(0, 19), min_size=1, max_size=block_size)
    prompts = draw(st.lists(prompt, min_size=1, max_size=4))
    n, seed, stop = draw(st.integers(0, 3 * block_size)), draw(st.integers(0, 2**40)), draw(st.integers(0, 19))
    temperature, top_k = draw(st.floats(0.1, 3)), draw(st.none() | st.integers(1, 30))
    top_p = draw(st.just(1.0) | st.floats(0.05, 1))
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": stop}
    expected = [
        plain_text(model, prompt, n, seed + i, temperature, top_k, top_p, stop) for i, prompt in enumerate(prompts)
    ]
    for use_cache in (True, False):
        assert generate(model, prompts, n, use_cache=use_cache, **options) == expected


@pytest.mark.parametrize("top_k", [1, 5, None])
def test_cached_and_uncached_texts_are_equal_far_past_the_context(top_k: int | None) -> None:
    model = random_gpt()
    cached = generate(model, PROMPTS, 60, seed=3, top_k=top_k)
    assert cached == generate(model, PROMPTS, 60, seed=3, top_k=top_k, use_cache=False)
    assert [len(row) for row in cached] == [len(prompt) + 60 for prompt in PROMPTS]
    assert len({tuple(row[-20:]) for row in cached}) == len(PROMPTS)


def test_past_the_context_the_model_sees_what_window_start_leaves() -> None:
    model = random_gpt(block_size=8)
    row = [3, 1, 4]
    for _ in range(30):
        seen = row[window_start(len(row), 8) :]
        row.append(int(model(torch.tensor([seen]))[0, -1].argmax()))
    assert generate(model, [[3, 1, 4]], 30, top_k=1) == [row]


def test_a_row_gives_the_text_that_it_gives_alone_under_its_own_seed() -> None:
    model = random_gpt()
    together = generate(model, PROMPTS, 40, seed=11)
    assert together == [generate(model, [prompt], 40, seed=11 + i)[0] for i, prompt in enumerate(PROMPTS)]


def test_left_padding_leaves_the_logits_alone() -> None:
    """The same hidden states, not only the same text: read in a batch of lengths 3, 1, 16, 11, 2 and alone."""
    from gpt2_lightning.generate import _Reader

    model = random_gpt(block_size=24)
    rows = [list(prompt) for prompt in PROMPTS]
    read = _Reader(model, use_cache=True, longest=24)
    with torch.no_grad():
        for token in (7, 8, 9):
            batch = read(rows)
            alone = torch.cat([model.hidden(torch.tensor([row]))[:, -1] for row in rows])
            assert (batch - alone).abs().max() < 1e-5
            for row in rows:
                row.append(token)


def test_the_seed_decides_the_text_and_the_global_generator_is_left_alone() -> None:
    model = random_gpt()
    torch.manual_seed(0)
    expected_draw = torch.rand(1)
    torch.manual_seed(0)
    first = generate(model, [[1]] * 4, 30, seed=1)
    assert torch.equal(torch.rand(1), expected_draw)
    assert first == generate(model, [[1]] * 4, 30, seed=1)
    assert len({tuple(row) for row in first}) == 4, "rows of one call differ"
    assert generate(model, [[1]], 30, seed=2)[0] == first[1], "sample i of seed s is sample 0 of seed s + i"
    assert generate(model, [[1]], 30) != generate(model, [[1]], 30), "without a seed each call differs"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"top_k": None}, [0.5, 0.1, 0.15, 0.25]),
        ({"top_k": None, "temperature": 0.5}, [0.25 / 0.345, 0.01 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
        ({"top_k": 2}, [2 / 3, 0, 0, 1 / 3]),
        ({"top_k": None, "top_p": 0.8}, [5 / 9, 0, 1.5 / 9, 2.5 / 9]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 0, 0, 1 / 3]),  # of three, 0.5 / 0.9 and 0.25 / 0.9 reach 0.8
        ({"top_k": 1}, [1, 0, 0, 0]),
    ],
)
def test_tokens_come_as_often_as_their_probabilities_say(options: dict[str, float], expected: list[float]) -> None:
    model = constant_gpt(torch.tensor([0.5, 0.1, 0.15, 0.25]).log())
    n = 4000
    tokens = generate(model, torch.zeros(n, 1, dtype=torch.long), 1, seed=0, **options)[:, 1]  # type: ignore[arg-type]
    found = torch.bincount(tokens, minlength=4) / n
    # four standard deviations of a share of 4,000 draws are at most 0.032
    assert (found - torch.tensor(expected)).abs().max() < 0.032
    assert [share > 0 for share in found.tolist()] == [share > 0 for share in expected]


@pytest.mark.parametrize("top_k", [1, 50, None])
def test_ids_of_the_padding_never_come_out_even_if_they_would_win(top_k: int | None) -> None:
    logits = torch.zeros(50304)
    logits[VOCAB_SIZE:] = 100.0
    logits[VOCAB_SIZE - 3 : VOCAB_SIZE - 1] = 50.0
    rows = generate(constant_gpt(logits), [[1]] * 20, 5, top_k=top_k, seed=0)
    assert {token for row in rows for token in row[1:]} <= {VOCAB_SIZE - 3, VOCAB_SIZE - 2}


@settings(max_examples=15)
@given(
    seed=SEEDS,
    scale=st.floats(0, 100),
    lead=st.floats(-1000, 1000),
    rows=st.integers(VOCAB_SIZE, 50304),
    temperature=st.floats(0.01, 100),
    top_k=st.none() | st.integers(1, 60_000),
    top_p=st.none() | st.floats(0.001, 1),
)
def test_padding_of_any_size_and_weight_changes_no_draw(
    seed: int, scale: float, lead: float, rows: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = drawn_logits(seed, 1, rows, scale)[0]
    logits[VOCAB_SIZE:] += lead
    options: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "stop": None}
    texts = [generate(constant_gpt(part), [[1], [2, 3]], 3, **options) for part in (logits, logits[:VOCAB_SIZE])]
    assert texts[0] == texts[1]
    assert max(max(row) for row in texts[0]) < VOCAB_SIZE


def test_a_text_stops_at_the_end_of_text_by_default() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[END_OF_TEXT] = 100.0
    heard: list[tuple[int, int]] = []
    model = constant_gpt(logits)
    assert generate(model, [[1], [2, END_OF_TEXT]], 9, on_token=lambda *t: heard.append(t)) == [[1], [2, END_OF_TEXT]]
    assert heard == []
    assert generate(model, [[1]], 9, stop=None) == [[1] + [END_OF_TEXT] * 9]
    assert generate(model, torch.tensor([[1]]), 9).tolist() == [[1, END_OF_TEXT]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_stopped_rows_are_cut_or_padded_and_do_not_disturb_the_others(use_cache: bool) -> None:
    model = random_gpt()
    free = generate(model, [[1], [2], [3]], 40, seed=0, stop=None)
    stop = free[0][8]
    expected = [row[: row.index(stop, 1)] if stop in row[1:] else row for row in free]
    assert len({len(row) for row in expected}) > 1
    heard: list[list[int]] = [[1], [2], [3]]
    hear: Callable[[int, int], None] = lambda row, token: heard[row].append(token)  # noqa: E731
    assert generate(model, [[1], [2], [3]], 40, seed=0, stop=stop, use_cache=use_cache, on_token=hear) == expected
    assert heard == expected, "what is streamed is what is returned"
    as_tensor = generate(model, torch.tensor([[1], [2], [3]]), 40, seed=0, stop=stop, use_cache=use_cache)
    width = max(len(row) + (len(row) < 41) for row in expected)  # the stop itself is there
    assert as_tensor.tolist() == [row + [stop] * (width - len(row)) for row in expected]


def test_the_train_or_eval_mode_is_put_back() -> None:
    model = random_gpt()
    for mode in (True, False):
        model.train(mode)
        generate(model, [[1]], 2)
        assert model.training is mode

    def interrupt(row: int, token: int) -> None:
        assert not model.training
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1]], 2, on_token=interrupt)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_head_in_pieces_gives_the_logits_of_the_model() -> None:
    from gpt2_lightning.generate import _head

    for vocab_size in (97, 29 * 4, VOCAB_SIZE, 50304):
        model = random_gpt(vocab_size=vocab_size)
        hidden = torch.randn(3, 12)
        rows = min(vocab_size, VOCAB_SIZE)
        expected = F.linear(hidden, model.lm_head.weight)[:, :rows]
        assert (_head(model, hidden, rows) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([1], {"temperature": 0.0}, "temperature is 0.0: give a number above 0"),
        ([1], {"temperature": -1.0}, "temperature is -1.0"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"top_p": 0.0}, "top_p is 0.0: give a number above 0 and at most 1"),
        ([1], {"top_p": 1.1}, "top_p is 1.1"),
        ([1], {"top_k": 0}, "top_k is 0: give a whole number of at least 1"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens is -1: give 0 or more"),
        ([], {}, "the prompt is empty"),
        ([1] * 17, {}, r"the prompt has 17 tokens, but the context \(block_size\) holds 16"),
        ([97], {}, "the prompt holds token id 97, but the vocabulary ends at 96"),
        ([-1], {}, "the prompt holds token id -1"),
    ],
)
def test_bad_requests_end_in_one_sentence(prompt: list[int], options: dict[str, float], says: str) -> None:
    options = {"max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=says) as caught:
        generate(random_gpt(), [[1], prompt], **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_no_new_tokens_gives_the_prompt() -> None:
    assert generate(random_gpt(), [[1, 2], [3]], 0) == [[1, 2], [3]]


def test_the_command_reads_end_of_text_in_a_prompt_as_the_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpt2_lightning.__main__ import main

    torch.manual_seed(0)
    shape = {"block_size": 1, "vocab_size": VOCAB_SIZE, "n_layer": 1, "n_head": 1, "n_embd": 2}  # holds one token
    state = {f"model.{name}": tensor for name, tensor in GPT(GPTConfig(**shape)).state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": shape}}, tmp_path / "a.ckpt")
    assert main(["generate", "a.ckpt", "--prompt", "<|endoftext|>", "--max_new_tokens", "1", "--seed", "0"]) == 0
    assert capsys.readouterr().out.startswith("<|endoftext|>")


# ---- streamed text


@settings(deadline=None)
@given(st.text())
def test_streamed_text_is_the_text(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()  # lone surrogates are no text
    stream = TextStream()
    parts = [stream.feed(token) for token in get_tokenizer().encode_ordinary(text)]
    assert "".join(parts) == text
    assert stream.finish() == ""


@settings(deadline=None)
@given(st.lists(st.integers(0, END_OF_TEXT)))
def test_streamed_text_of_any_tokens_is_tiktokens(tokens: list[int]) -> None:
    stream = TextStream()
    assert "".join(map(stream.feed, tokens)) + stream.finish() == get_tokenizer().decode(tokens)


def test_half_a_character_waits_for_the_other_half() -> None:
    stream = TextStream()
    tokens = get_tokenizer().encode_ordinary("é😀!")
    assert len(tokens) == 4  # é, two tokens of the emoji, !
    assert [stream.feed(token) for token in tokens] == ["é", "", "😀", "!"]
    stream.feed(tokens[1])
    assert stream.finish() == "\ufffd"
