"""Filters and sampling on literals and against transformers; cache, batch and context window never change a text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, TopKLogitsWarper, TopPLogitsWarper

from gpt2_lightning import GPT, GPTConfig
from gpt2_lightning.checkpoints.hf import from_hf
from gpt2_lightning.generate import (
    TextStream,
    context_start,
    filter_top_k,
    filter_top_p,
    generate,
    pick,
)
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer

INF = float("inf")
PROMPTS = [[1, 2, 3], [4], list(range(16)), [9] * 11, [50, 60]]


def random_gpt(block_size: int = 16, vocab_size: int = 97, n_layer: int = 3, n_head: int = 2, n_embd: int = 12) -> GPT:
    """Large weights in the blocks, so that a text depends on all earlier tokens and does not repeat one token."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        model.lm_head.weight.mul_(0.3)
    return model


def constant_gpt(logits: Tensor) -> GPT:
    """A model that returns these logits for every input."""
    model = GPT(GPTConfig(block_size=8, vocab_size=len(logits), n_layer=1, n_head=1, n_embd=2)).eval()
    with torch.no_grad():
        model.transformer.get_parameter("ln_f.weight").zero_()
        model.transformer.get_parameter("ln_f.bias").copy_(torch.tensor([1.0, 0.0]))
        model.lm_head.weight[:, 0] = logits
    return model


def random_logits(seed: int, rows: int, columns: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


SEEDS = st.integers(0, 2**32 - 1)

# ---- pure functions


def test_filter_top_k_keeps_exactly_the_k_largest() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0], [-1.0, -2.0, 0.5, -3.0]])
    assert filter_top_k(logits, 2).tolist() == [[-INF, 4.0, -INF, 3.0], [-1.0, -INF, 0.5, -INF]]
    assert filter_top_k(logits, 9).tolist() == logits.tolist()
    assert filter_top_k(torch.zeros(1, 5), 2).isfinite().sum() == 2  # ties


@pytest.mark.parametrize(
    ("p", "kept"), [(1e-45, [0]), (0.49, [0]), (0.51, [0, 3]), (0.74, [0, 3]), (0.76, [0, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_filter_top_p_keeps_the_fewest_that_reach_p_and_at_least_one(p: float, kept: list[int]) -> None:
    logits = torch.tensor([[0.5, 0.1, 0.15, 0.25]]).log()
    filtered = filter_top_p(logits, p)
    assert filtered.isfinite().nonzero()[:, 1].tolist() == kept
    assert torch.equal(filtered[:, kept], logits[:, kept])


@settings(max_examples=50)
@given(SEEDS, st.integers(1, 4), st.integers(1, 60), st.floats(0.01, 30), st.integers(1, 80), st.floats(0.01, 0.999))
def test_the_filters_equal_those_of_transformers(
    seed: int, rows: int, columns: int, scale: float, k: int, p: float
) -> None:
    logits = random_logits(seed, rows, columns, scale)
    ids: Any = None  # not used by these filters
    assert torch.equal(filter_top_k(logits, k), TopKLogitsWarper(k)(ids, logits))
    assert torch.equal(filter_top_p(logits, p), TopPLogitsWarper(p)(ids, logits))


LARGEST_U = 1 - 2**-24  # of torch.rand


@pytest.mark.parametrize(("u", "column"), [(0.0, 1), (0.24, 1), (0.26, 2), (0.74, 2), (0.76, 4), (LARGEST_U, 4)])
def test_pick_inverts_the_cumulative_distribution(u: float, column: int) -> None:
    logits = torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]]).log()
    assert pick(logits, torch.tensor([u])).tolist() == [column]


@settings(max_examples=50)
@given(SEEDS, st.integers(1, 30), st.sampled_from([0.0, LARGEST_U]) | st.floats(0, LARGEST_U, width=32), st.data())
def test_pick_never_returns_a_filtered_column(seed: int, columns: int, u: float, data: st.DataObject) -> None:
    kept = data.draw(st.sets(st.integers(0, columns - 1), min_size=1))
    logits = random_logits(seed, 1, columns, 20.0)
    logits[:, [column for column in range(columns) if column not in kept]] = -INF
    assert int(pick(logits, torch.tensor([u]))) in kept


@pytest.mark.parametrize(
    ("block_size", "starts"),
    [
        (8, [0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12]),
        (5, [0, 0, 0, 0, 0, 3, 3, 3, 6, 6, 6, 9]),
        (1, [0, 1, 2, 3]),
    ],
)
def test_the_context_window_moves_by_half_of_its_size(block_size: int, starts: list[int]) -> None:
    assert [context_start(length, block_size) for length in range(1, len(starts) + 1)] == starts


# ---- generated text


def test_greedy_text_equals_that_of_transformers() -> None:
    shape = {"n_positions": 128, "vocab_size": VOCAB_SIZE, "n_layer": 3, "n_head": 2, "n_embd": 16}
    theirs = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in theirs.named_parameters():  # independent of how this version of transformers initializes
            p.normal_(1.0 if "ln_" in name and name.endswith("weight") else 0.0, 0.3)
    ours = GPT(GPTConfig(128, VOCAB_SIZE, 3, 2, 16))
    ours.load_state_dict(from_hf(theirs.state_dict()), strict=False)
    texts = ["Hello, I'm a language model,", "\n", "def f(x):", "漢字 and 😀", "The capital of France is"]
    prompts = [get_tokenizer().encode_ordinary(text) for text in texts]
    batch = generate(ours, prompts, 100, top_k=1, stop=None)
    for prompt, tokens in zip(prompts, batch, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert len(set(expected[0, len(prompt) :].tolist())) > 5, "a text that repeats one token proves little"
        assert tokens == expected[0].tolist()
        assert generate(ours, torch.tensor([prompt]), 100, top_k=1, stop=None).tolist() == expected.tolist()


def plain_text(
    model: GPT, prompt: Sequence[int], n: int, seed: int, temperature: float, top_k: int | None, top_p: float, stop: int
) -> list[int]:
    """Reference: one text at a time, without a cache, in Python numbers."""
    generator, block_size, text = torch.Generator().manual_seed(seed), model.config.block_size, list(prompt)
    for _ in range(n):
        start = 0
        while len(text) - start > block_size:
            start += (block_size + 1) // 2
        with torch.no_grad():
            logits = [x / temperature for x in model(torch.tensor([text[start:]]))[0, -1, :VOCAB_SIZE].tolist()]
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
        text.append(token)
    return text


@settings(max_examples=30)
@given(data=st.data())
def test_texts_of_a_batch_equal_a_plain_loop_over_each_with_and_without_the_cache(data: st.DataObject) -> None:
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


def test_the_seed_decides_the_text_and_the_global_generator_is_not_used() -> None:
    model = random_gpt()
    state = torch.get_rng_state()
    first = generate(model, [[1]] * 4, 30, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == generate(model, [[1]] * 4, 30, seed=1)
    assert len({tuple(text) for text in first}) == 4
    assert generate(model, [[1]], 30, seed=2)[0] == first[1], "text i of seed s is text 0 of seed s + i"
    assert generate(model, [[1]], 30) != generate(model, [[1]], 30), "without a seed, calls differ"


@pytest.mark.parametrize("top_k", [1, 50, None])
def test_padding_ids_are_never_sampled_and_change_no_text(top_k: int | None) -> None:
    logits = random_logits(0, 1, 50304)[0]
    logits[VOCAB_SIZE:] += 100.0
    options: Any = {"top_k": top_k, "seed": 0, "stop": None}
    padded, unpadded = (generate(constant_gpt(x), [[1]] * 20, 5, **options) for x in (logits, logits[:VOCAB_SIZE]))
    assert padded == unpadded
    assert max(map(max, padded)) < VOCAB_SIZE


def test_a_text_ends_at_end_of_text_by_default() -> None:
    logits = torch.zeros(VOCAB_SIZE)
    logits[END_OF_TEXT] = 100.0
    model = constant_gpt(logits)
    assert generate(model, [[1], [2, END_OF_TEXT]], 9) == [[1], [2, END_OF_TEXT]]
    assert generate(model, [[1]], 9, stop=None) == [[1] + [END_OF_TEXT] * 9]
    assert generate(model, torch.tensor([[1]]), 9).tolist() == [[1, END_OF_TEXT]]
    assert generate(model, [[1, 2], [3]], 0) == [[1, 2], [3]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_text_that_ends_early_does_not_change_the_others(use_cache: bool) -> None:
    model = random_gpt()
    free = generate(model, [[1], [2], [3]], 40, seed=0, stop=None)
    stop = free[0][8]
    expected = [text[: text.index(stop, 1)] if stop in text[1:] else text for text in free]
    assert len({len(text) for text in expected}) > 1
    streamed: list[list[int]] = [[1], [2], [3]]
    options: Any = {"seed": 0, "stop": stop, "use_cache": use_cache}
    texts = generate(model, [[1], [2], [3]], 40, on_token=lambda i, token: streamed[i].append(token), **options)
    assert texts == streamed == expected
    as_tensor = generate(model, torch.tensor([[1], [2], [3]]), 40, **options)
    width = max(len(text) + (len(text) < 41) for text in expected)  # a tensor includes the stop token
    assert as_tensor.tolist() == [text + [stop] * (width - len(text)) for text in expected]


def test_the_training_mode_is_restored_even_after_an_interrupt() -> None:
    model = random_gpt().train()

    def interrupt(i: int, token: int) -> None:
        assert not model.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [[1]], 2, on_token=interrupt)
    assert model.training


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1], {"temperature": 0.0}, "temperature is 0.0: give a number above 0"),
        ([1], {"top_p": 1.1}, "top_p is 1.1: give a number above 0 and at most 1"),
        ([1], {"top_k": 0}, "top_k is 0: give a whole number of at least 1"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens is -1: give 0 or more"),
        ([], {}, "the prompt is empty"),
        ([1] * 17, {}, "the prompt has 17 tokens, but block_size is 16"),
        ([97], {}, "the prompt has the token id 97, but the vocabulary ends at 96"),
    ],
)
def test_settings_and_prompts_out_of_range_are_refused(
    prompt: list[int], options: dict[str, float], message: str
) -> None:
    options = {"max_new_tokens": 2} | options
    with pytest.raises(ValueError, match=message):
        generate(random_gpt(), [[1], prompt], **options)  # type: ignore[arg-type]


def test_the_command_encodes_end_of_text_in_a_prompt_as_one_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from gpt2_lightning.__main__ import main

    shape = {"block_size": 1, "vocab_size": VOCAB_SIZE, "n_layer": 1, "n_head": 1, "n_embd": 2}  # fits one token
    state = {f"model.{name}": tensor for name, tensor in GPT(GPTConfig(**shape)).state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"config": shape}}, tmp_path / "a.ckpt")
    assert main(["generate", "a.ckpt", "--prompt", "<|endoftext|>", "--max_new_tokens", "1", "--seed", "0"]) == 0
    assert capsys.readouterr().out.startswith("<|endoftext|>")


# ---- streamed text


@given(st.lists(st.integers(0, END_OF_TEXT)))
def test_streamed_text_equals_tiktokens_decoding(tokens: list[int]) -> None:
    stream = TextStream()
    assert "".join(map(stream.feed, tokens)) + stream.finish() == get_tokenizer().decode(tokens)


def test_a_character_is_streamed_with_its_last_token() -> None:
    stream = TextStream()
    tokens = get_tokenizer().encode_ordinary("é😀!")
    assert len(tokens) == 4  # é, two tokens of the emoji, !
    assert [stream.feed(token) for token in tokens] == ["é", "", "😀", "!"]
    stream.feed(tokens[1])
    assert stream.finish() == "\ufffd"
