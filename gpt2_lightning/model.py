"""GPT-2 (Radford et al. 2019), from top to bottom: config, attention, MLP, block, GPT.

Parameters are named as in Hugging Face's ``GPT2LMHeadModel`` (``transformer.h.0.attn.c_attn.weight``). Linear weights
are stored as ``nn.Linear`` stores them, (out, in); Hugging Face's Conv1D stores the transpose.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt2_lightning.errors import UserError


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2. The defaults are GPT-2 (124M) with a padded vocabulary."""

    block_size: int = 1024
    """Maximum sequence length in tokens: the number of learned positions."""
    vocab_size: int = 50304
    """Rows of the token embedding: GPT-2's 50,257 tokens, padded to a multiple of 128 for efficient kernels."""
    n_layer: int = 12
    """Number of blocks."""
    n_head: int = 12
    """Number of attention heads in each block; must divide ``n_embd``."""
    n_embd: int = 768
    """Width of the residual stream."""

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if size is None or size < 1:  # None is an empty value in a recipe
                raise UserError(f"{name} is {size}: give a whole number of at least 1")
        if self.n_embd % self.n_head != 0:
            raise UserError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}: change one of them")


class LayerCache(Protocol):
    """The key-value cache of one layer, as attention uses it (see ``generate.KVCache``)."""

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new keys and values (B, n_head, T, head_size) and returns all S of them so far."""


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value of all heads in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, nh, S, hs), S >= T
        # one new token may attend to the whole cache; several new tokens after cached ones need a mask
        assert mask is not None or T in (1, k.size(2))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1)
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # concatenate the heads: (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # GPT-2 uses the tanh approximation of GELU


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
    """GPT-2: ``model(idx)`` returns logits, ``model.hidden(idx)`` the hidden states before the head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: backward recomputes each block, for less memory and more compute
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.get_parameter("wte.weight")  # weight tying
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        """std 0.02, and 0.02 / √(2 · n_layer) where one of 2 · n_layer layers adds to the residual stream; biases 0."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, CausalSelfAttention | MLP):  # apply() visits children first, so this overrides 0.02
            nn.init.normal_(module.c_proj.weight, mean=0.0, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def hidden(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, n_embd), after ``ln_f``; ``lm_head`` turns them into logits.

        Args:
            idx: token ids (B, T).
            positions: position of each token, (T,) or (B, T); defaults to 0 … T-1.
            mask: boolean, True where a query may attend to a key, broadcastable to (B, n_head, T, S); defaults to
                causal.
            cache: one key-value cache per layer. S is the number of tokens in it after this call; S = T without one.
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
                x = block(x, mask, cache[i] if cache is not None else None)
        return self.transformer["ln_f"](x)

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) → logits (B, T, vocab_size)."""
        return self.lm_head(self.hidden(idx))

    def num_parameters(self) -> int:
        """Number of parameters, with the tied matrix counted once: 124,439,808 for GPT-2 (124M)."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> int:
        """Training FLOPs per token, forward and backward (PaLM paper, appendix B, with causal attention).

        6 for each weight of a matmul: 12 · n_embd² in a block, and the head (embeddings are look-ups). The two
        attention matmuls add 12 · n_layer · n_embd · T, of which a causal mask needs half. 798M for the default config.
        """
        c = self.config
        matmul_weights = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * matmul_weights + 6 * c.n_layer * c.n_embd * c.block_size
