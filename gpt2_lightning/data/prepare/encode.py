"""Documents to tokens: cleaned, numbered, split into train and val, and encoded by a pool of threads, in order."""

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from gpt2_lightning.data.prepare.sources import CHUNK_BYTES, Chunk, Cursor
from gpt2_lightning.tokenizer import END_OF_TEXT, get_tokenizer

COUNTED = ("kept", "null", "empty", "replaced")
"""What becomes of documents."""
VAL_EVERY = 100
"""Of any source but FineWeb-EDU, documents 0, 100, 200 … are held out: two documents make two splits."""
IN_FLIGHT_CHUNKS = 64  # ≈ 16 MB of text ahead of the writer: the tokenizer goes on while a shard is hashed and synced

# A run of white space that is very long overflows the tokenizer's regex. The regex itself would end a piece before the
# last character of such a run, so that cutting there gives the same tokens.
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG_RUN_END = re.compile(f"(?<=[{_WHITE}]{{1000}})(?=[{_WHITE}][^{_WHITE}])")


def encode(text: str) -> np.ndarray:
    """A document's tokens, uint16: ``<|endoftext|>``, then the text. Special tokens spelt in the text stay text."""
    tokenizer = get_tokenizer()
    try:
        pieces = [tokenizer.encode_to_numpy(text, disallowed_special=())]
    except ValueError:
        pieces = [tokenizer.encode_to_numpy(part, disallowed_special=()) for part in _LONG_RUN_END.split(text)]
    return np.concatenate([np.array([END_OF_TEXT]), *pieces], dtype=np.uint16, casting="unsafe")


@dataclass(frozen=True)
class Batch:
    """Documents that go through the tokenizer together."""

    begin: Cursor
    texts: list[str]
    counts: dict[str, int]
    """What became of the documents: kept, null, empty, replaced."""
    first: int
    """Number of the first one among all documents that are kept."""
    progress: float | None

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


def _clean(chunk: Chunk, first: int) -> Batch:
    texts, counts = [], dict.fromkeys(COUNTED, 0)
    for value in chunk.values:
        text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
        if text is None or not text or text.isspace():
            counts["null" if text is None else "empty"] += 1
            continue
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # what is not UTF-8, or a lone surrogate that JSON spelt out
                text = re.sub("[\ud800-\udfff]", "\ufffd", text)
                counts["replaced"] += 1
        texts.append(text)
    counts["kept"] = len(texts)
    return Batch(chunk.begin, texts, counts, first, chunk.progress)


def batches_of(chunks: Iterator[Chunk], first: int) -> Iterator[Batch]:
    """The chunks' documents, cleaned and numbered from ``first`` on; the first two documents come in one batch."""
    held: Batch | None = None
    for chunk in chunks:
        batch = _clean(chunk, first)
        if held:
            batch = replace(
                batch, begin=held.begin, texts=held.texts + batch.texts, counts=add_counts(held.counts, batch.counts)
            )
        held = batch if first + len(batch.texts) < 2 else None
        if not held:
            yield batch
            first += len(batch.texts)
    if held:
        yield held


def add_counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {key: a[key] + b[key] for key in a}


def _tokenize(batch: Batch, hold_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """The batch's train and val tokens. With ``hold_out`` every 100th document is val, or the end of the only one."""
    documents = [encode(text) for text in batch.texts]
    val = [hold_out and number % VAL_EVERY == 0 for number in range(batch.first, batch.first + len(documents))]
    if hold_out and batch.first == 0 and len(documents) == 1:
        cut = len(documents[0]) * 9 // 10
        documents, val = [documents[0][:cut], documents[0][cut:]], [False, True]
    empty = np.empty(0, dtype=np.uint16)
    return (
        np.concatenate([empty, *(tokens for tokens, held_out in zip(documents, val, strict=True) if not held_out)]),
        np.concatenate([empty, *(tokens for tokens, held_out in zip(documents, val, strict=True) if held_out)]),
    )


def tokenized(batches: Iterator[Batch], hold_out: bool, workers: int) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
    """The batches in their order with their tokens, some of them ahead of time."""
    pending: deque[tuple[Batch, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    limit, in_flight = max(IN_FLIGHT_CHUNKS, 2 * workers) * CHUNK_BYTES, 0  # characters: documents may be huge
    with ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for batch in batches:
                pending.append((batch, pool.submit(_tokenize, batch, hold_out)))
                in_flight += batch.characters
                while in_flight > limit:
                    batch, tokens = pending.popleft()
                    in_flight -= batch.characters
                    yield batch, *tokens.result()
            for batch, tokens in pending:
                yield batch, *tokens.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
