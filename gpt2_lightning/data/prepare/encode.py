"""Turns documents into tokens: cleans and numbers them, splits them into train and val, and encodes them in threads."""

import re
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from gpt2_lightning.data.prepare.sources import CHUNK_CHARACTERS, Chunk, Cursor
from gpt2_lightning.tokenizer import END_OF_TEXT, get_tokenizer

COUNTED = ("kept", "null", "empty", "replaced")
"""What the manifest counts: documents kept, skipped as null or empty, and kept with U+FFFD for what was not UTF-8."""
VAL_EVERY = 100
"""Documents 0, 100, 200 … are held out (of any source but FineWeb-EDU), so that two documents fill both splits."""
PENDING_CHUNKS = 64  # ≈ 16 MB of text: keeps the threads busy while a shard is hashed and synced to disk

_LONG_WHITE_SPACE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}+")


def encode_document(text: str) -> np.ndarray:
    """Returns ``<|endoftext|>`` and the tokens of ``text``, uint16. Special tokens spelled in the text stay text."""
    tokenizer = get_tokenizer()
    try:
        pieces = [tokenizer.encode_to_numpy(text, disallowed_special=())]
    except ValueError:  # a run of a million white space characters overflows the tokenizer's regex
        parts = split_long_white_space(text)
        pieces = [tokenizer.encode_to_numpy(part, disallowed_special=()) for part in parts]
    return np.concatenate([np.array([END_OF_TEXT]), *pieces], dtype=np.uint16, casting="unsafe")


def split_long_white_space(text: str) -> list[str]:
    """Splits a text before the last character of each long run of white space, unless the run ends the text.

    The tokenizer's regex itself ends a piece there, so the tokens of the parts are the tokens of the text.
    """
    ends = [match.end() for match in _LONG_WHITE_SPACE.finditer(text)]
    cuts = [end - 1 for end in ends if end < len(text)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


@dataclass
class DocumentBatch:
    """Cleaned documents that one thread encodes together."""

    first: int
    """Number of the first document, among all documents that are kept."""
    texts: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    end: Cursor | None = None
    """The position in the source after the last document."""
    progress: float | None = None
    """Fraction of the source read by then, if known."""

    @property
    def next(self) -> int:
        return self.first + len(self.texts)

    def add(self, chunk: Chunk) -> None:
        for text in chunk.documents:
            if text is None:
                self.counts["null"] += 1
            elif not text or text.isspace():
                self.counts["empty"] += 1
            else:
                valid = replace_surrogates(text)
                self.texts.append(valid)
                self.counts["kept"] += 1
                self.counts["replaced"] += valid != text
        self.end, self.progress = chunk.end, chunk.progress


def replace_surrogates(text: str) -> str:
    """Replaces lone surrogates, which stand for bytes that are not UTF-8 or were escaped in JSON, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def batch_documents(chunks: Iterator[Chunk], first: int) -> Iterator[DocumentBatch]:
    """Yields a batch for each chunk, numbering documents from ``first``.

    The first two documents come in one batch: an only document is split otherwise than the first of several.
    """
    batch = DocumentBatch(first)
    for chunk in chunks:
        batch.add(chunk)
        if batch.next >= 2:
            yield batch
            batch = DocumentBatch(batch.next)
    if batch.end is not None:
        yield batch


def encode_batch(batch: DocumentBatch, hold_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the train and the val tokens of a batch, uint16.

    With ``hold_out``, every 100th document is val, or the last tenth of the tokens if there is only one document.
    """
    documents = [encode_document(text) for text in batch.texts]
    if hold_out and batch.first == 0 and len(documents) == 1:
        cut = len(documents[0]) * 9 // 10
        return documents[0][:cut], documents[0][cut:]
    train, val = [np.empty(0, dtype=np.uint16)], [np.empty(0, dtype=np.uint16)]
    for number, tokens in enumerate(documents, batch.first):
        (val if hold_out and number % VAL_EVERY == 0 else train).append(tokens)
    return np.concatenate(train), np.concatenate(val)


def encode_batches(
    batches: Iterator[DocumentBatch], hold_out: bool, workers: int
) -> Iterator[tuple[DocumentBatch, np.ndarray, np.ndarray]]:
    """Yields the batches in order with their train and val tokens, while ``workers`` threads encode ahead."""
    pending: deque[tuple[DocumentBatch, int, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    room = max(PENDING_CHUNKS, 2 * workers) * CHUNK_CHARACTERS  # in characters, because a document may be huge
    with ThreadPoolExecutor(workers) as pool:
        try:
            for batch in batches:
                size = sum(map(len, batch.texts))
                pending.append((batch, size, pool.submit(encode_batch, batch, hold_out)))
                room -= size
                while room < 0:
                    batch, size, tokens = pending.popleft()
                    room += size
                    yield batch, *tokens.result()
            for batch, _, tokens in pending:
                yield batch, *tokens.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
