"""The network: GPT-2 as published (Radford et al. 2019), top-down: config, attention, MLP, block, GPT.

Parameters carry the names of Hugging Face's ``GPT2LMHeadModel`` (``transformer.h.0.attn.c_attn.weight`` …), stored as
``nn.Linear`` stores them, (out, in): HF's Conv1D holds the transpose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt2_lightning.errors import UserError


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. The defaults are GPT-2 (124M) with its vocabulary padded to a multiple of 128."""

    block_size: int = 1024
    """Longest sequence, in tokens: the number of learned positions."""
    vocab_size: int = 50304
    """Rows of the embedding: 50,257 tokens of GPT-2's BPE, and 47 that are never used, for round kernels."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Attention heads per block; divides ``n_embd``."""
    n_embd: int = 768
    """Width of the residual stream."""

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if value is None or not 1 <= value < 2**24:  # None: left empty in a recipe
                raise UserError(f"{name} is {value}: give a whole number of at least 1, and below {2**24}")
        if self.n_embd % self.n_head != 0:
            heads = [h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0]
            nearest = sorted(sorted(heads, key=lambda h: abs(h - self.n_head))[:4])
            raise UserError(
                f"n_head={self.n_head} does not divide n_embd={self.n_embd}: set n_head to one of {nearest}"
            )


class LayerCache(Protocol):
    """What attention asks of a key-value cache: take this step's keys and values, give back all so far."""

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value of all heads in one matrix
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, nh, S, hs), S >= T
        # a single new token may see all of the cache; several at once need the caller's mask
        assert mask is not None or T in (1, k.size(2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # (B, T, C), heads side by side
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # OpenAI's GELU is the tanh approximation


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """GPT-2. ``model(idx)`` gives logits; ``model.hidden(idx)`` stops before the head, for what needs no logits.

    Where ``activation_checkpointing`` is set, training keeps each block's input only and computes the rest of it again
    in the backward pass: the same numbers for up to a third more compute and a fraction of the memory.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = wte.weight  # tied: the embedding is the classifier
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """std 0.02, biases 0; what writes into the residual stream, 2·n_layer times, 0.02 / sqrt(2·n_layer)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, CausalSelfAttention | MLP):  # apply() visits children first, so this is the last word
            nn.init.normal_(module.c_proj.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, n_embd), after ``ln_f``: ``lm_head`` of them gives the logits.

        Args:
            idx: token ids (B, T).
            positions: position of each token, (T,) or (B, T), below ``block_size``; 0 … T-1 when not given.
            mask: what each query may see, boolean, broadcastable to (B, n_head, T, S); causal when not given.
            cache: one key-value cache per layer, S = tokens in it after this call; S = T without one.
        """
        T = idx.size(1)
        if positions is None:
            if self.config.block_size < T:
                raise UserError(f"a sequence of {T} tokens does not fit block_size={self.config.block_size}")
            positions = torch.arange(T, device=idx.device)  # (T,)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](positions)  # (B, T, n_embd)
        for i, block in enumerate(self.transformer["h"]):  # type: ignore[var-annotated, arg-type]
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask, None if cache is None else cache[i])
        return self.transformer["ln_f"](x)

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) → logits (B, T, vocab_size)."""
        return self.lm_head(self.hidden(idx))

    def num_parameters(self) -> int:
        """Parameters, the tied matrix counted once: 124,439,808 for GPT-2 (124M) with 50,257 rows."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs per token, forward and backward, after the PaLM paper's appendix B with causal attention.

        6 per weight in a matmul (the head is one, the embeddings are look-ups), and 6·n_layer·n_embd·T for the two
        attention matmuls, of which causality needs half. 798M for GPT-2 (124M) with 50,304 rows at T=1024.
        """
        c = self.config
        matmul_weights = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * matmul_weights + 6 * c.n_layer * c.n_embd * c.block_size
