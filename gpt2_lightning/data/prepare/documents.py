"""The documents in one file on this machine: text, JSON lines (plain, gzip, xz) and parquet."""

import gzip
import json
import lzma
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from gpt2_lightning.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
Value = bytes | str | None
"""A document as it lies in a source: None is null; bytes, and lone surrogates in a str, may not be UTF-8."""


def open_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give this user the right to, or name another"
        ) from error


def file_records(path: Path, text_column: str, start: int) -> Iterator[tuple[Value, float]]:
    """The documents of one file from number ``start`` on, each with the part of the file (0 to 1) that is read by then.

    Raises:
        UserError: the file is damaged, or has no text under ``text_column``.
    """
    if path.suffix == ".parquet":
        yield from _parquet(path, text_column, start)
    elif ".jsonl" in path.suffixes:
        yield from _json_lines(path, text_column, start)
    elif start == 0:  # a text file is one document
        with open_file(path) as file:
            yield file.read().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n"), 1.0


def _json_lines(path: Path, text_column: str, start: int) -> Iterator[tuple[Value, float]]:
    size = max(path.stat().st_size, 1)
    number = record = 0  # of lines, and of those that are not blank
    with ExitStack() as stack:
        raw = stack.enter_context(open_file(path))
        lines: Any = raw
        if path.suffix == ".gz":
            lines = stack.enter_context(gzip.GzipFile(fileobj=raw))
        elif path.suffix == ".xz":
            lines = stack.enter_context(lzma.LZMAFile(raw))
        try:
            for line in lines:
                number += 1
                if line.isspace():
                    continue
                if record >= start:
                    yield _json_text(line, text_column), raw.tell() / size
                record += 1
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise UserError(f"{path} is damaged after line {number} ({error}): fetch it again") from error
        except ValueError as error:
            raise UserError(f"{path} line {number} {error}") from error


def _json_text(line: bytes, text_column: str) -> Value:
    try:
        values = json.loads(line.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error}): correct or remove it") from error
    if not isinstance(values, dict):
        raise UserError('is not an object such as {"text": "…"}: correct or remove it')
    if text_column not in values:
        raise UserError(f"has no {text_column!r}: name one of {', '.join(values)} with --text_column")
    text = values[text_column]
    if not isinstance(text, str | None):
        raise UserError(f"holds {type(text).__name__} under {text_column!r}, not text: name another with --text_column")
    return text


def _parquet(path: Path, text_column: str, start: int) -> Iterator[tuple[Value, float]]:
    import pyarrow as pa
    from pyarrow import parquet

    with open_file(path) as raw:
        try:
            file = parquet.ParquetFile(raw)
            require_text(path, text_column, file.schema_arrow)
            end = 0  # of the row group
            for group in range(file.num_row_groups):
                number, end = end, end + file.metadata.row_group(group).num_rows
                if end <= start:
                    continue
                for batch in file.iter_batches(64, row_groups=[group], columns=[text_column], use_threads=False):
                    for value in texts(batch.column(0)):
                        number += 1
                        if number > start:
                            yield value, number / file.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is not a whole parquet file ({first_line(error)}): fetch it again") from error


def require_text(where: object, text_column: str, schema: Any) -> None:
    """``UserError`` unless an Arrow schema has a column of text under that name."""
    import pyarrow as pa

    if text_column not in schema.names:
        raise UserError(
            f"{where} has no column {text_column!r}: name one of {', '.join(schema.names)} as --text_column"
        )
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{where} holds {kind} in column {text_column!r}, not text: name another as --text_column")


def texts(column: Any) -> list[Value]:
    """An Arrow column's texts as bytes: Arrow does not see to it that they are UTF-8, and a str would have to be."""
    import pyarrow as pa

    return column.cast(pa.large_binary()).to_pylist()


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
