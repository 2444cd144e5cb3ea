"""Where documents come from: the standard library, local files, or a dataset on the Hugging Face hub.

A source yields `Chunk`s of documents in one fixed order, and can start at any position between two chunks.
"""

import glob
import hashlib
import platform
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gpt2_lightning.data.prepare.documents import (
    SUFFIXES,
    Document,
    column_documents,
    first_line,
    open_file,
    read_documents,
)
from gpt2_lightning.errors import UserError

Cursor = dict[str, int]
"""A position between two documents, as JSON: the number of the file, and of the next document in it."""

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_DOCUMENTS = {"sample-10BT": 9_672_101}  # the hub's count, for the progress bar only
CHUNK_CHARACTERS = 1 << 18  # ≈ 60k tokens: much more work than handing it to a thread, little enough to share evenly
CHUNK_DOCUMENTS = 1024
OUTAGE_SECONDS = 20 * 60.0  # how long the hub may fail without yielding one document before we give up
DAMAGE_SECONDS = 60.0  # the same for data that cannot be decoded: a broken transfer recovers, a broken file does not
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts, doubled each time


@dataclass(frozen=True)
class Chunk:
    """Consecutive documents."""

    documents: list[Document]
    end: Cursor
    """The position after the last document."""
    progress: float | None
    """Fraction of the whole source that has been read by then, or None if unknown."""


class Source(Protocol):
    """What `prepare` needs from a source."""

    label: str
    """The first part of the shards' file names."""
    first_shard_is_val: bool
    """True: shard 0 is held out (build-nanogpt's FineWeb-EDU). False: every 100th document."""

    def identity(self) -> dict[str, Any]:
        """What the documents are, down to the commit or the files' hash: equal identities have equal documents."""

    def read(self, start: Cursor | None) -> Iterator[Chunk]:
        """Yields the chunks from a position on; None is the beginning. Raises ``UserError`` if reading fails."""


def split_revision(source: str | list[str], revision: str | None) -> tuple[str | list[str], str | None]:
    """Splits ``ORG/NAME@REVISION`` into source and revision; any other source stays as it is.

    Raises:
        UserError: ``revision`` is a different one.
    """
    if isinstance(source, list) and len(source) == 1:
        source = source[0]
    if isinstance(source, list) or _is_local(source):
        return source, revision
    name, _, named = source.partition("@")
    if not named:
        return source, revision
    if revision not in (None, named):
        raise UserError(f"{source} and --revision {revision} name different revisions: remove one of them")
    return name, named


def canonical_name(source: str | list[str], name: str | None) -> tuple[str | list[str], str | None]:
    """Source and dataset configuration as manifests record them: aliases resolved, and files without their folders."""
    if isinstance(source, list):
        return [Path(item).name for item in source], name
    if source in ("fineweb-edu", FINEWEB_EDU):
        return FINEWEB_EDU, name or "sample-10BT"
    return Path(source).name if _is_local(source) else source, name


def open_source(
    source: str | list[str], *, name: str | None = None, text_column: str = "text", revision: str | None = None
) -> Source:
    """Finds the files or the dataset that ``source`` names. Arguments as for `prepare`.

    Raises:
        UserError: no such file, dataset or configuration, or no network.
    """
    patterns = [source] if isinstance(source, str) else source
    local = all(map(_is_local, patterns))
    if (local or source == "stdlib") and (name or revision):
        raise UserError("only datasets on the hub have a --name or a --revision: remove them")
    if source == "stdlib":
        return _open_stdlib()
    canonical, name = canonical_name(source, name)
    if local:
        paths = _find_files(patterns)
        stem = paths[0].name.split(".")[0] if len(paths) == 1 else "corpus"
        return FileSource(_label(stem), paths, {"source": canonical}, text_column)
    if not isinstance(canonical, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", canonical):
        raise UserError(
            f"{source!r} is not a source: give stdlib, fineweb-edu, ORG/NAME on the hub, or files "
            f"({' '.join(SUFFIXES)})"
        )
    return _open_hub(canonical, name, text_column, revision)


def _is_local(source: str) -> bool:
    is_path = source.endswith(SUFFIXES) or glob.has_magic(source) or Path(source).exists()
    return is_path and source not in ("stdlib", "fineweb-edu")


def _label(name: str) -> str:
    return re.sub(r"[^\w-]", "_", name) or "corpus"


def _chunks(documents: Iterator[tuple[Document, Cursor, float | None]]) -> Iterator[Chunk]:
    """Groups documents, each with the position after it and the progress, into chunks."""
    chunk: list[Document] = []
    characters = 0
    for text, end, progress in documents:
        chunk.append(text)
        characters += len(text or "")
        if characters >= CHUNK_CHARACTERS or len(chunk) == CHUNK_DOCUMENTS:
            yield Chunk(chunk, end, progress)
            chunk, characters = [], 0
    if chunk:
        yield Chunk(chunk, end, progress)


# -- local files -------------------------------------------------------------------------------------------------------


@dataclass
class FileSource:
    """Files on this machine, in a fixed order."""

    label: str
    paths: list[Path]
    description: dict[str, Any]
    """The part of the identity that is known without reading the files."""
    text_column: str
    first_shard_is_val: bool = False

    def identity(self) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        for path in self.paths:
            with open_file(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())  # type: ignore[arg-type]  # typeshed
                size += file.tell()
        return self.description | {"files": len(self.paths), "bytes": size, "sha256": digest.hexdigest()}

    def read(self, start: Cursor | None) -> Iterator[Chunk]:
        return _chunks(self._documents(**(start or {"file": 0, "document": 0})))

    def _documents(self, file: int, document: int) -> Iterator[tuple[Document, Cursor, float]]:
        sizes = [path.stat().st_size for path in self.paths]
        total = max(sum(sizes), 1)
        for index in range(file, len(self.paths)):
            start, before = document if index == file else 0, sum(sizes[:index])
            for end, (text, part) in enumerate(read_documents(self.paths[index], self.text_column, start), start + 1):
                yield text, {"file": index, "document": end}, (before + part * sizes[index]) / total


def _open_stdlib() -> FileSource:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    paths = [root / name for name in names if left_out.isdisjoint(name.split("/"))]
    return FileSource("stdlib", paths, {"source": "stdlib", "python": platform.python_version()}, "text")


def _find_files(patterns: list[str]) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        # an existing name is taken literally, even if it has brackets in it
        found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"there is no file {pattern}: correct the path of --source")
        paths += map(Path, found)
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name its files, for example {path / '*.jsonl'}")
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path} has an unknown file type: convert it to one of {' '.join(SUFFIXES)}")
    return paths


def local_bytes(source: str | list[str]) -> int | None:
    """Total size of the files that a source names; None for any other source, and for files that no longer exist."""
    patterns = [source] if isinstance(source, str) else source
    try:
        return sum(path.stat().st_size for path in _find_files(patterns)) if all(map(_is_local, patterns)) else None
    except (UserError, OSError):
        return None


# -- the hub -----------------------------------------------------------------------------------------------------------


@dataclass
class HubSource:
    """A dataset on the Hugging Face hub at one commit, streamed by `datasets`. Network outages are waited out."""

    repo: str
    name: str | None
    revision: str
    """The commit, as a hash."""
    text_column: str
    n_documents: int | None
    """Number of documents if known, for the progress bar only."""
    dataset: Any
    """A streaming `datasets.IterableDataset`."""

    def __post_init__(self) -> None:
        self.first_shard_is_val = self.repo == FINEWEB_EDU
        self.label = "edufineweb" if self.first_shard_is_val else _label(self.repo.split("/")[1])

    def identity(self) -> dict[str, Any]:
        return {"source": self.repo, "name": self.name, "revision": self.revision}

    def read(self, start: Cursor | None) -> Iterator[Chunk]:
        """Yields the chunks. After a failure it tries again from the last whole chunk.

        `datasets` itself retries a lost connection for about 100 s; this is for longer outages.
        """
        cursor = start or {"file": 0, "document": 0, "total": 0}
        failing_since: float | None = None
        pause = FIRST_PAUSE
        while True:
            try:
                for chunk in _chunks(self._documents(**cursor)):
                    yield chunk
                    cursor, failing_since, pause = chunk.end, None, FIRST_PAUSE
                return
            except UserError:
                raise
            except Exception as error:
                if failing_since is None:
                    failing_since = time.monotonic()
                patience = DAMAGE_SECONDS if isinstance(error, ValueError | LookupError | TypeError) else OUTAGE_SECONDS
                what = f"{self.repo} fails after document {cursor['total']} ({first_line(error)})"
                if time.monotonic() - failing_since + pause > patience:
                    raise UserError(f"{what}: run the same command again later, it resumes there") from error
                print(f"{what}: trying again in {pause:.0f} s", file=sys.stderr)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _documents(self, file: int, document: int, total: int) -> Iterator[tuple[Document, Cursor, float | None]]:
        """To start in the middle of a file, its beginning is read again and skipped, as `datasets` does itself."""
        files = self.dataset.num_shards
        for index in range(file, files):
            skip, end = (document if index == file else 0), 0
            for table in self.dataset.shard(files, index).with_format("arrow").iter(batch_size=256):
                for text in column_documents(self.repo, self.text_column, table.column_names, table):
                    end += 1
                    if end > skip:
                        total += 1
                        progress = total / self.n_documents if self.n_documents else None
                        yield text, {"file": index, "document": end, "total": total}, progress


def _open_hub(repo: str, name: str | None, text_column: str, revision: str | None) -> HubSource:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(repo, revision=revision).sha
        assert commit is not None
        dataset = datasets.load_dataset(repo, name, split="train", streaming=True, revision=commit)
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision}: choose another --revision") from error
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"the hub has no dataset {repo} that you may read: correct --source, or log in with `hf auth login` (and "
            "accept its terms on the hub if it is gated)"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"the hub does not give {repo} ({first_line(error)}): log in with `hf auth login` if it needs that, "
            "or run the same command again later"
        ) from error
    except (ValueError, FileNotFoundError) as error:  # no such configuration, split or files
        raise UserError(f"{repo} cannot be opened ({first_line(error)}): correct --source or --name") from error
    except Exception as error:  # a network fails in many ways
        raise UserError(
            f"the hub cannot be reached for {repo} ({first_line(error)}): check the network, or use local files"
        ) from error
    splits = dataset.info.splits or {}
    n_documents = splits["train"].num_examples if "train" in splits else None
    if repo == FINEWEB_EDU and name:
        n_documents = n_documents or FINEWEB_EDU_DOCUMENTS.get(name)
    return HubSource(repo, name, commit, text_column, n_documents, dataset)
