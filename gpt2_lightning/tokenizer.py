"""GPT-2's byte-pair encoding through tiktoken, from the ranks that ship with this package: no network, no cache."""

import base64
import hashlib
from functools import cache
from importlib.resources import files

import tiktoken

from gpt2_lightning.errors import UserError

END_OF_TEXT = 50256
"""Id of ``<|endoftext|>``: every document begins with it, and generation stops at it."""
VOCAB_SIZE = 50257
"""Tokens that GPT-2's BPE has: 50,256 ranks and ``<|endoftext|>``. Ids from here on are padding, never sampled."""
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""sha256 of the rank table (OpenAI's, MIT); manifests name the tokenizer by it."""

# GPT-2's pre-tokenizer, in the possessive form that OpenAI's own tiktoken uses: same pieces, less backtracking
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@cache
def get_tokenizer() -> tiktoken.Encoding:
    """The encoding. Documents go through ``encode_ordinary``: ``encode`` refuses text that spells ``<|endoftext|>``."""
    table = (files("gpt2_lightning") / "assets" / "gpt2.tiktoken").read_bytes()
    if hashlib.sha256(table).hexdigest() != RANKS_SHA256:
        raise UserError("the BPE ranks inside the package (assets/gpt2.tiktoken) are damaged: reinstall gpt2_lightning")
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in table.splitlines())}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )
