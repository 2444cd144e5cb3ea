"""Reads the documents of one local file: text, JSON lines (plain, gzip or xz) or parquet."""

import gzip
import json
import lzma
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from gpt2_lightning.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
Document = str | None
"""The text of a document, or None for null. A byte that is not UTF-8 is a lone surrogate ("surrogateescape")."""


def read_documents(path: Path, text_column: str, start: int = 0) -> Iterator[tuple[Document, float]]:
    """Yields the documents of a file, beginning with number ``start``, each with the fraction of the file read so far.

    Raises:
        UserError: the file cannot be read, is damaged, or has no text under ``text_column``.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, text_column, start)
    elif ".jsonl" in path.suffixes:
        yield from _read_json_lines(path, text_column, start)
    elif start == 0:  # a text file is one document
        with open_file(path) as file:
            content = file.read().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
        yield content.decode("utf-8", "surrogateescape"), 1.0


def open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): change its permissions or choose another"
        ) from error


def _read_json_lines(path: Path, text_column: str, start: int) -> Iterator[tuple[Document, float]]:
    size = max(path.stat().st_size, 1)
    number = document = 0  # of lines, and of those that are not blank
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    with open_file(path) as file, openers.get(path.suffix, nullcontext)(file) as lines:
        try:
            for line in lines:
                number += 1
                if line.isspace():
                    continue
                if document >= start:
                    yield _text_of_json(line, text_column), file.tell() / size
                document += 1
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise UserError(f"{path} is damaged after line {number} ({error}): download it again") from error
        except ValueError as error:
            raise UserError(f"{path} line {number} {error}") from error


def _text_of_json(line: bytes, text_column: str) -> Document:
    try:
        values = json.loads(line.decode("utf-8-sig", "surrogateescape"))
    except ValueError as error:
        raise ValueError(f"is not JSON ({error}): correct or remove it") from error
    if not isinstance(values, dict):
        raise ValueError('is not an object such as {"text": "…"}: correct or remove it')
    if text_column not in values:
        raise ValueError(f"has no {text_column!r}: set --text_column to one of {', '.join(values)}")
    text = values[text_column]
    if not isinstance(text, Document):
        raise ValueError(f"has {type(text).__name__} under {text_column!r}, not text: set --text_column to another key")
    return text


def _read_parquet(path: Path, text_column: str, start: int) -> Iterator[tuple[Document, float]]:
    import pyarrow as pa
    from pyarrow import parquet

    with open_file(path) as raw:
        try:
            file = parquet.ParquetFile(raw)
            columns, number = file.schema_arrow.names, 0
            for batch in file.iter_batches(64, columns=[text_column], use_threads=False):
                for text in column_documents(path, text_column, columns, batch):
                    number += 1
                    if number > start:
                        yield text, number / file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is not a whole parquet file ({first_line(error)}): download it again") from error


def column_documents(where: object, text_column: str, columns: list[str], table: Any) -> list[Document]:
    """The documents in an Arrow table or batch. They are read as bytes: Arrow does not check that they are UTF-8."""
    import pyarrow as pa

    if text_column not in columns:
        raise UserError(f"{where} has no column {text_column!r}: set --text_column to one of {', '.join(columns)}")
    column = table.column(text_column)
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not (is_text or pa.types.is_string_view(column.type)):  # a cast would take binary columns for text
        raise UserError(
            f"{where} has {column.type} in column {text_column!r}, not text: set --text_column to another column"
        )
    contents = column.cast(pa.large_binary()).to_pylist()
    return [None if content is None else content.decode("utf-8", "surrogateescape") for content in contents]


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
