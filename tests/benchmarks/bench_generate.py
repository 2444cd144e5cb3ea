"""Greedy generation by a GPT-2 of the 124M shape: with our KV cache, without it, and by transformers. Not a test.

python tests/benchmarks/bench_generate.py [new tokens] [rounds]
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2_lightning.checkpoints.hf import to_hf
from gpt2_lightning.generate import generate
from gpt2_lightning.model import GPT, GPTConfig


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def main(new_tokens: int = 256, rounds: int = 3) -> None:
    torch.manual_seed(0)
    ours = GPT(GPTConfig(vocab_size=50257)).eval()
    theirs = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    theirs.load_state_dict(to_hf(ours.state_dict()), strict=False)
    theirs.tie_weights()
    prompt = torch.randint(0, 50257, (1, 16))

    def by_us(n: int, use_cache: bool = True) -> Any:
        return generate(ours, prompt, n, top_k=1, stop=None, use_cache=use_cache)

    def by_transformers(n: int) -> Any:
        length = {"max_new_tokens": n, "min_new_tokens": n}
        return theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length
        )

    by_us(4), by_transformers(4)  # warm up
    pairs = [(timed(lambda: by_us(new_tokens)), timed(lambda: by_transformers(new_tokens))) for _ in range(rounds)]
    ours_seconds, their_seconds = ([seconds for seconds, _ in column] for column in zip(*pairs, strict=True))
    cached, reference = (sorted(seconds)[rounds // 2] for seconds in (ours_seconds, their_seconds))
    uncached, text = timed(lambda: by_us(new_tokens, use_cache=False))
    same = torch.equal(text, pairs[0][0][1]) and torch.equal(text, pairs[0][1][1])
    print(
        f"{new_tokens} tokens: cached {cached:.2f} s, transformers {reference:.2f} s ({reference / cached:.2f} x), "
        f"uncached {uncached:.2f} s ({uncached / cached:.2f} x); the same text: {same}"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
