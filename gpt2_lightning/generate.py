"""Text generation: filters over logits, the key-value cache, the sampling loop, and a decoder for streamed tokens."""

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
    """Keeps the k largest logits of each row (…, V), exactly k even with ties, and sets the others to -inf."""
    values, columns = logits.topk(min(k, logits.size(-1)))
    return torch.full_like(logits, -torch.inf).scatter(-1, columns, values)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus sampling (Holtzman et al. 2019): keeps the fewest logits of each row (…, V) whose probabilities reach p.

    Sets the others to -inf. The most likely token is always kept.
    """
    values, columns = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = values.softmax(dim=-1)
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    values = values.masked_fill(mass_before >= p, -torch.inf)
    values[..., :1] = logits.amax(dim=-1, keepdim=True)  # p may be smaller than the rounding error of mass_before
    return torch.full_like(logits, -torch.inf).scatter(-1, columns, values)


def pick(logits: Tensor, u: Tensor) -> Tensor:
    """Samples one column from each row of logits (B, V): inverts the cumulative distribution at u (B,), in [0, 1).

    The same u picks the same column on the CPU, CUDA and MPS; their own random generators would differ.
    """
    cdf = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    # u · total < total also after rounding, for every u that torch.rand draws, so the count stays below V
    return (cdf <= u.unsqueeze(1) * cdf[:, -1:]).sum(dim=-1)  # (B,)


def context_start(length: int, block_size: int) -> int:
    """Index of the first token in the context window of a text of ``length`` tokens; 0 while the text fits.

    Positions are absolute: moving the window by one token would invalidate the whole cache. It moves by half a window
    instead. For block_size=8 it starts at 0 up to length 8, at 4 for lengths 9 to 12, at 8 for 13 to 16.
    """
    half = (block_size + 1) // 2
    return max(0, -(-(length - block_size) // half)) * half


class KVCache:
    """Keys and values of one layer, (B, n_head, capacity, head_size), allocated once, on the first update."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values (B, n_head, T, head_size) and returns views of all so far."""
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


class LastHiddenState:
    """Computes the final hidden state of each text's last token. Texts of different lengths are padded on the left.

    Between two calls each text may only grow, by one token: with a cache, only that token is computed.
    """

    def __init__(self, model: GPT, use_cache: bool, max_length: int) -> None:
        self.model = model
        self.use_cache = use_cache
        self.capacity = min(max_length, model.config.block_size)
        self.starts: list[int] = []  # of the context windows in the cache
        self.cache: list[KVCache] = []
        self.padding: Tensor | None = None  # padding tokens before each text, (B, 1)
        self.device = model.lm_head.weight.device

    def __call__(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of B texts → hidden states (B, n_embd)."""
        starts = [context_start(len(text), self.model.config.block_size) for text in texts]
        if self.use_cache and starts == self.starts:
            return self._decode(texts)
        self.starts = starts
        return self._prefill([text[start:] for text, start in zip(texts, starts, strict=True)])

    def _prefill(self, contexts: list[Sequence[int]]) -> Tensor:
        """Runs the model on whole context windows, and fills a new cache."""
        T = max(map(len, contexts))
        padding = [T - len(context) for context in contexts]
        idx = torch.tensor([[0] * n + list(c) for n, c in zip(padding, contexts, strict=True)], device=self.device)
        if self.use_cache:
            self.cache = [KVCache(self.capacity) for _ in range(self.model.config.n_layer)]
        if not any(padding):
            self.padding = None
            return self.model.hidden(idx, cache=self.cache or None)[:, -1]
        self.padding = torch.tensor(padding, device=self.device).unsqueeze(1)  # (B, 1)
        columns = torch.arange(T, device=self.device)
        positions = (columns - self.padding).clamp(min=0)  # (B, T)
        causal = columns <= columns.unsqueeze(1)  # (T, T)
        # padding attends to itself: a softmax over no key would be NaN, and 0 · NaN would spread to the text
        mask = causal & (columns >= self.padding).unsqueeze(1) | torch.eye(T, dtype=torch.bool, device=self.device)
        return self.model.hidden(idx, positions, mask.unsqueeze(1), self.cache or None)[:, -1]  # mask: (B, 1, T, T)

    def _decode(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Runs the model on the last token of each text, with all earlier ones in the cache."""
        idx = torch.tensor([[text[-1]] for text in texts], device=self.device)
        S = self.cache[0].length + 1
        if self.padding is None:
            return self.model.hidden(idx, torch.tensor([S - 1], device=self.device), None, self.cache)[:, -1]
        mask = torch.arange(S, device=self.device) >= self.padding  # (B, S)
        return self.model.hidden(idx, S - 1 - self.padding, mask[:, None, None], self.cache)[:, -1]


def vocabulary_logits(model: GPT, hidden: Tensor, vocab_size: int) -> Tensor:
    """Logits (B, vocab_size) of the first ``vocab_size`` tokens for hidden states (B, n_embd)."""
    weight = model.lm_head.weight[:vocab_size]
    # For a small batch, MKL runs the matmul with one large matrix on a single core. As a batched matmul of 29 pieces
    # (50,257 = 29 · 1,733) it uses all cores: 7 ms instead of 13 for GPT-2 (124M) on 2 cores of an EPYC, where the head
    # takes a third of the time of a token.
    n = 29 if weight.device.type == "cpu" and vocab_size % 29 == 0 else 1
    logits = hidden @ weight.view(n, vocab_size // n, -1).transpose(1, 2)  # (n, B, vocab_size / n)
    return logits.transpose(0, 1).reshape(-1, vocab_size)


def sample_tokens(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, generators: list[torch.Generator]
) -> Tensor:
    """Samples one token from each row of logits (B, V), each with its own generator: (B,)."""
    if top_k == 1:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        logits = filter_top_k(logits, top_k)
    if top_p < 1:
        logits = filter_top_p(logits, top_p)
    u = torch.cat([torch.rand(1, generator=generator) for generator in generators])
    return pick(logits, u.to(logits.device))


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """Raises a UserError that names the setting that is out of range."""
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give 0 or more")
    if not temperature > 0:
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
            raise UserError(f"the prompt has {len(prompt)} tokens, but block_size is {block_size}: shorten the prompt")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise UserError(f"the prompt has the token id {token}, but the vocabulary ends at {vocab_size - 1}")


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
    """Extends each prompt by up to ``max_new_tokens`` tokens, on the model's device.

    Text i is sampled with its own generator, seeded with ``seed + i``, so it does not depend on the other texts or on
    the cache (except for the rounding of matmuls). torch's global generator is not used. Padding ids of the vocabulary
    (50,257 and above) are never sampled. Texts may grow beyond ``block_size``, see ``context_start``.

    Args:
        model: evaluated in eval mode; its mode is restored afterwards.
        idx: prompts, as a LongTensor (B, T) or as lists of token ids of any lengths.
        max_new_tokens: maximum number of new tokens for each prompt.
        temperature: divides the logits; above 0.
        top_k: samples from the k most likely tokens only; 1 is greedy, None keeps all.
        top_p: samples from the fewest of those whose probabilities reach p, in (0, 1]; None keeps all.
        seed: None takes a seed from the operating system.
        stop: token that ends a text; None disables it.
        use_cache: False recomputes the whole context window for each token: slow, for comparison.
        on_token: called with (i, token) for each new token of text i, except ``stop``.

    Returns:
        For lists: lists of prompt and new tokens, without ``stop``. For a tensor: a LongTensor (B, T + most new tokens)
        in which texts that ended are filled up with ``stop``.

    Raises:
        UserError: a setting is out of range; a prompt is empty, too long, or has ids beyond the vocabulary.
    """
    texts: list[list[int]] = idx.tolist() if isinstance(idx, Tensor) else [list(prompt) for prompt in idx]
    top_p = 1.0 if top_p is None else top_p
    vocab_size = min(model.config.vocab_size, VOCAB_SIZE)
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    _check_prompts(texts, model.config.block_size, vocab_size)

    seed = secrets.randbits(62) if seed is None else seed
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    last_hidden_state = LastHiddenState(model, use_cache, max(map(len, texts)) + max_new_tokens)
    lengths: dict[int, int] = {}  # of the texts that have ended
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = vocabulary_logits(model, last_hidden_state(texts), vocab_size).float()  # (B, V)
            tokens = sample_tokens(logits, temperature, top_k, top_p, generators)  # (B,)
            for i, (text, token) in enumerate(zip(texts, tokens.tolist(), strict=True)):
                if i in lengths:
                    token = stop  # all texts grow until the last one ends
                elif token == stop:
                    lengths[i] = len(text)
                elif on_token is not None:
                    on_token(i, token)
                text.append(token)
            if len(lengths) == len(texts):
                break
    finally:
        model.train(was_training)
    if isinstance(idx, Tensor):
        return torch.tensor(texts, dtype=torch.long, device=idx.device)
    return [text[: lengths.get(i)] for i, text in enumerate(texts)]


class TextStream:
    """Decodes GPT-2 tokens as they arrive. A character that spans several tokens comes with the last of them."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Returns the text completed by this token; "" inside a character, U+FFFD for invalid UTF-8."""
        return self._decoder.decode(get_tokenizer().decode_single_token_bytes(token))

    def finish(self) -> str:
        """Returns U+FFFD if the last character is incomplete, else ""."""
        return self._decoder.decode(b"", final=True)
