"""Sampling: filters over logits, the key-value cache, the loop, and a decoder that streams text token by token."""

import codecs
import secrets
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gpt2_lightning.errors import UserError
from gpt2_lightning.model import GPT
from gpt2_lightning.tokenizer import END_OF_TEXT, VOCAB_SIZE, get_tokenizer

Prompts = TypeVar("Prompts", Tensor, list[list[int]])


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row of ``logits`` (…, V), exactly k even among equals; the others become -inf."""
    values, columns = logits.topk(min(k, logits.size(-1)))
    return torch.full_like(logits, -torch.inf).scatter(-1, columns, values)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest columns of each row of ``logits`` (…, V) whose probabilities reach p; the others become -inf.

    Nucleus sampling (Holtzman et al. 2019). The likeliest column always stays.
    """
    values, columns = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1)
    likelier = probabilities.cumsum(dim=-1) - probabilities  # the mass before each column
    values = values.masked_fill(likelier >= p, -torch.inf)
    values[..., :1] = logits.amax(dim=-1, keepdim=True)  # p below one rounding error still leaves one
    return torch.full_like(logits, -torch.inf).scatter(-1, columns, values)


def pick(logits: Tensor, u: Tensor) -> Tensor:
    """Draw one column from each row of ``logits`` (B, V) by inverting its distribution at ``u`` (B,), each in [0, 1).

    u decides, not a generator on the device: the same u gives the same column on the CPU, CUDA and MPS.
    """
    cdf = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    # u·total < total in floating point for every u that torch.rand draws, so the count never reaches V
    return (cdf <= u.unsqueeze(1) * cdf[:, -1:]).sum(dim=-1)  # (B,)


def window_start(length: int, block_size: int) -> int:
    """First token that the model sees when a text of ``length`` tokens goes on.

    0 while the text fits. Positions are learned and absolute, so a window that slid by one token would change every key
    and value; it hops by half the context instead, and a cache is rebuilt once per hop. With a block_size of 8: 0 up to
    length 8, 4 for the lengths 9 to 12, 8 for 13 to 16.
    """
    hop = (block_size + 1) // 2
    return max(0, -(-(length - block_size) // hop)) * hop


class KVCache:
    """Keys and values of one layer, (B, n_head, capacity, head_size), allocated once at the first update."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append this step's keys and values (B, n_head, T, head_size); return all so far, as views."""
        B, n_head, T, head_size = k.size()
        if self.k is None or self.v is None:
            self.k = k.new_empty(B, n_head, self.capacity, head_size)
            self.v = v.new_empty(B, n_head, self.capacity, head_size)
        end = self.length + T
        assert end <= self.capacity
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class _Reader:
    """The final hidden state at the end of each text, whatever their lengths; a cache spares reading a text again."""

    def __init__(self, model: GPT, use_cache: bool, longest: int) -> None:
        self.model = model
        self.use_cache = use_cache
        self.capacity = min(longest, model.config.block_size)
        self.starts: list[int] = []  # of the windows in the cache
        self.cache: list[KVCache] = []
        self.pads: Tensor | None = None  # columns of padding before each row, (B, 1)
        self.device = model.lm_head.weight.device

    def __call__(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B, n_embd). Between two calls each row may only have grown by one token."""
        starts = [window_start(len(row), self.model.config.block_size) for row in rows]
        if self.use_cache and starts == self.starts:
            return self._read_last(rows)
        self.starts = starts
        return self._read_windows(rows)

    def _read_windows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        windows = [row[start:] for row, start in zip(rows, self.starts, strict=True)]
        T = max(map(len, windows))
        pads = [T - len(window) for window in windows]
        # any id will do on the left: nothing looks at it
        idx = torch.tensor([[0] * pad + list(w) for pad, w in zip(pads, windows, strict=True)], device=self.device)
        if self.use_cache:
            self.cache = [KVCache(self.capacity) for _ in range(self.model.config.n_layer)]
        if not any(pads):
            self.pads = None
            return self.model.hidden(idx, cache=self.cache or None)[:, -1]
        self.pads = torch.tensor(pads, device=self.device).unsqueeze(1)
        columns = torch.arange(T, device=self.device)
        positions = (columns - self.pads).clamp(min=0)  # (B, T)
        causal = columns <= columns.unsqueeze(1)  # (T, T)
        # padding sees itself, for a softmax over nothing is NaN, and 0 · NaN would spread to the others
        mask = causal & (columns >= self.pads).unsqueeze(1) | torch.eye(T, dtype=torch.bool, device=self.device)
        return self.model.hidden(idx, positions, mask.unsqueeze(1), self.cache or None)[:, -1]  # mask (B, 1, T, T)

    def _read_last(self, rows: Sequence[Sequence[int]]) -> Tensor:
        idx = torch.tensor([[row[-1]] for row in rows], device=self.device)
        S = self.cache[0].length + 1
        if self.pads is None:
            return self.model.hidden(idx, torch.tensor([S - 1], device=self.device), None, self.cache)[:, -1]
        mask = torch.arange(S, device=self.device) >= self.pads  # (B, S)
        return self.model.hidden(idx, S - 1 - self.pads, mask[:, None, None], self.cache)[:, -1]


def _head(model: GPT, hidden: Tensor, vocab_size: int) -> Tensor:
    """The first ``vocab_size`` logits (B, vocab_size) of hidden states (B, n_embd)."""
    weight = model.lm_head.weight[:vocab_size]
    # With few rows, MKL multiplies by one large matrix on one core. As a batch of pieces (50,257 = 29 · 1,733) it takes
    # all cores: the head of GPT-2 (124M), a third of the time of a token, 7 ms where it took 13 on 2 cores of an EPYC
    n = 29 if weight.device.type == "cpu" and vocab_size % 29 == 0 else 1
    logits = hidden @ weight.view(n, vocab_size // n, -1).transpose(1, 2)  # (n, B, vocab_size / n)
    return logits.transpose(0, 1).reshape(-1, vocab_size)


def check_settings(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """`ValueError` that begins with the name of the setting that is out of its range."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give 0 or more")
    if not temperature >= 1e-30:  # the logits, divided by less, would overflow
        raise UserError(f"temperature is {temperature}: give a number above 0 (top_k=1 is greedy)")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: give a number above 0 and at most 1 (1 keeps every token)")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: give a whole number of at least 1 (1 is greedy)")


def _check_prompts(prompts: list[list[int]], block_size: int, vocab_size: int) -> None:
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt is empty: give at least one token, such as <|endoftext|>, which begins a text")
        if len(prompt) > block_size:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the context (block_size) holds {block_size}: shorten it"
            )
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise UserError(f"the prompt holds token id {token}, but the vocabulary ends at {vocab_size - 1}")


@torch.no_grad()
def generate(
    model: GPT,
    idx: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int | None = None,
    stop: int | None = END_OF_TEXT,
    use_cache: bool = True,
    on_token: Callable[[int, int], None] | None = None,
) -> Prompts:
    """Continue each prompt by up to ``max_new_tokens`` tokens, on the model's device.

    Row i draws from a generator of its own, seeded with ``seed + i``: its text depends neither on the other rows nor on
    the cache (up to the rounding of a matmul), and torch's global generator is left alone. Ids from 50,257 on, the
    padding of the vocabulary, cannot come out. Past ``block_size`` the model sees what ``window_start`` leaves.

    Args:
        model: its train/eval mode is put back afterwards.
        idx: prompts of one length, a LongTensor (B, T); or of any lengths, as lists of token ids.
        max_new_tokens: at most so many for each prompt.
        temperature: divides the logits; above 0.
        top_k: sample among the k likeliest tokens; 1 is greedy, None keeps all.
        top_p: of those, among the fewest whose probabilities reach p, in (0, 1]; None keeps all.
        seed: None draws one from the operating system.
        stop: the token that ends a text; None never ends one early.
        use_cache: False reads the whole window again for each token: slow, for comparison.
        on_token: called with (row, token) for each new token as it comes, but not for ``stop``.

    Returns:
        For a tensor, a LongTensor (B, T + tokens of the longest continuation); ended rows are filled with ``stop``.
        For lists, lists: prompt and continuation, without ``stop``.

    Raises:
        ValueError: a setting out of its range; a prompt that is empty, too long, or not of the vocabulary.
    """
    prompts: list[list[int]] = idx.tolist() if isinstance(idx, Tensor) else [list(prompt) for prompt in idx]
    top_p = 1.0 if top_p is None else top_p
    vocab_size = min(model.config.vocab_size, VOCAB_SIZE)
    check_settings(max_new_tokens, temperature, top_k, top_p)
    _check_prompts(prompts, model.config.block_size, vocab_size)

    rows = [list(prompt) for prompt in prompts]
    ends: list[int | None] = [None] * len(rows)  # where each text ends, once it has
    seed = secrets.randbits(62) if seed is None else seed
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(rows))]
    device = model.lm_head.weight.device
    was_training = model.training
    model.eval()
    try:
        read = _Reader(model, use_cache, max(map(len, rows)) + max_new_tokens)
        for _ in range(max_new_tokens):
            logits = _head(model, read(rows), vocab_size).float()  # (B, V)
            if top_k == 1:
                tokens = logits.argmax(dim=-1)  # (B,)
            else:
                logits = logits / temperature
                logits = logits if top_k is None else filter_top_k(logits, top_k)
                logits = logits if top_p == 1 else filter_top_p(logits, top_p)
                u = torch.cat([torch.rand(1, generator=generator) for generator in generators])  # (B,)
                tokens = pick(logits, u.to(device))  # (B,)
            for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
                if ends[i] is not None:
                    row.append(row[-1])  # stop once more: all rows grow until the last one ends
                    continue
                row.append(token)
                if token == stop:
                    ends[i] = len(row) - 1
                elif on_token is not None:
                    on_token(i, token)
            if None not in ends:
                break
    finally:
        model.train(was_training)
    if isinstance(idx, Tensor):
        return torch.tensor(rows, dtype=torch.long, device=idx.device)
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


class TextStream:
    """GPT-2 tokens in, text out as soon as its bytes are whole: one character may span several byte-level tokens."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that is certain after this token, empty inside a character; U+FFFD for bytes that are no UTF-8."""
        return self._decoder.decode(get_tokenizer().decode_single_token_bytes(token))

    def finish(self) -> str:
        """What is left at the end of the text: U+FFFD for a character that was cut short, else nothing."""
        return self._decoder.decode(b"", final=True)
