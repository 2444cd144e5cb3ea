"""GPT-2's byte-pair encoding with tiktoken, from the ranks in this package: nothing is downloaded or cached."""

import base64
import hashlib
from functools import cache
from importlib.resources import files

import tiktoken

END_OF_TEXT = 50256
"""Id of ``<|endoftext|>``, which begins each document and ends generated text."""
VOCAB_SIZE = 50257
"""GPT-2's tokens: 50,256 ranks and ``<|endoftext|>``. Larger ids are padding and are never sampled."""
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
"""sha256 of OpenAI's rank table (MIT license); manifests identify the tokenizer by it."""

# GPT-2's pre-tokenizer with possessive quantifiers, as in tiktoken: the same pieces with less backtracking
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@cache
def get_tokenizer() -> tiktoken.Encoding:
    """GPT-2's encoding. Encode documents with ``encode_ordinary``: ``encode`` raises on the text ``<|endoftext|>``."""
    table = (files("gpt2_lightning") / "assets" / "gpt2.tiktoken").read_bytes()
    assert hashlib.sha256(table).hexdigest() == RANKS_SHA256, "assets/gpt2.tiktoken differs: reinstall gpt2_lightning"
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in table.splitlines())}
    return tiktoken.Encoding(
        name="gpt2",
        explicit_n_vocab=VOCAB_SIZE,
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
    )
