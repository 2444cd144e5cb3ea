"""Documents in: the standard library, local files, hub datasets, each read from any point on, in one fixed order.

A source delivers `Chunk`s of raw documents. Every chunk knows the place where it begins, and `read` goes on from any
such place, so that a preparation which was cut continues where its last whole shard ended.
"""

import glob
import hashlib
import platform
import queue
import re
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gpt2_lightning.data.prepare.documents import (
    SUFFIXES,
    Value,
    file_records,
    first_line,
    open_file,
    require_text,
    texts,
)
from gpt2_lightning.errors import UserError

Cursor = dict[str, int]
"""A place between two documents, as JSON: the file's number and how many of its records lie before it."""
Record = tuple[Value, Cursor, float | None]
"""A document, the place after it, and the part of the whole source (0 to 1) that is read by then, where it is known."""

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
FINEWEB_EDU_DOCUMENTS = {"sample-10BT": 9_672_101}  # the hub's count; it only feeds the estimate of the time left
CHUNK_BYTES = 1 << 18  # ≈ 60k tokens: long enough to outweigh a thread's hand-over, short enough to share out evenly
CHUNK_RECORDS = 1024
READ_AHEAD_CHUNKS = 8
OUTAGE_SECONDS = 20 * 60.0  # how long the hub may fail without one document between before we give up
DAMAGE_SECONDS = 60.0  # the same where bytes make no sense: a cut transfer comes right, a file that is wrong does not
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries, doubled each time


@dataclass(frozen=True)
class Chunk:
    """Some documents in a row."""

    begin: Cursor
    end: Cursor
    values: list[Value]
    progress: float | None
    """The part of the whole source that is read when this chunk ends, 0 to 1; None where it cannot be known."""


class Source(Protocol):
    """What `prepare` needs to know of a source."""

    @property
    def label(self) -> str:
        """The first part of the shards' names."""

    @property
    def first_shard_is_val(self) -> bool:
        """True: shard 0 is held out (build-nanogpt's FineWeb-EDU). False: every 100th document."""

    def identity(self) -> dict[str, Any]:
        """What the documents are, down to the revision or the files' hash: equal identity, equal documents."""

    def read(self, begin: Cursor | None) -> Iterator[Chunk]:
        """The chunks from a place on, from the start for None. ``ValueError`` if the source fails for good."""


def canonical(source: str | list[str], name: str | None = None) -> tuple[str | list[str], str | None]:
    """Source and configuration as manifests name them: no aliases, and no folders of one machine."""
    if isinstance(source, list):
        return canonical(source[0], name) if len(source) == 1 else ([Path(item).name for item in source], name)
    if source in ("fineweb-edu", FINEWEB_EDU):
        return FINEWEB_EDU, name or "sample-10BT"
    return (Path(source).name if _is_local(source) else source), name


def pinned(source: str | list[str], revision: str | None = None) -> tuple[str | list[str], str | None]:
    """``ORG/NAME@REVISION`` taken apart; another source as it is.

    Raises:
        ValueError: ``revision`` is another one.
    """
    if isinstance(source, list):
        return pinned(source[0], revision) if len(source) == 1 else (source, revision)
    name, _, its_revision = source.partition("@")
    if not its_revision or _is_local(source):
        return source, revision
    if revision not in (None, its_revision):
        raise UserError(f"{source} names one revision and --revision {revision} another: leave one of them out")
    return name, its_revision


def open_source(
    source: str | list[str], *, name: str | None = None, text_column: str = "text", revision: str | None = None
) -> Source:
    """The source that the words name.

    Args:
        source: ``stdlib``, ``fineweb-edu``, ORG/NAME on the hub, or files (.txt, .jsonl, .jsonl.gz, .jsonl.xz,
            .parquet): a path, a glob, or a list of them, read in that order, each glob's files sorted by name.
        name: configuration of a hub dataset; of fineweb-edu sample-10BT if not given.
        text_column: the column or key that holds the text.
        revision: branch, tag or commit of a hub dataset.

    Raises:
        ValueError: no such file, dataset, configuration or network.
    """
    patterns = [source] if isinstance(source, str) else source
    local = all(_is_local(pattern) for pattern in patterns)
    if (local or patterns == ["stdlib"]) and (name or revision):
        raise UserError("only datasets on the hub have a --name or a --revision: leave them out")
    if patterns == ["stdlib"]:
        return _open_stdlib()
    if local:
        return _open_files(patterns, text_column)
    repo, name = canonical(source, name)
    if not isinstance(repo, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise UserError(
            f"{source!r} is no source: give stdlib, fineweb-edu, ORG/NAME on the hub, or files ({' '.join(SUFFIXES)})"
        )
    return _open_hub(repo, name, text_column, revision)


def _is_local(source: str) -> bool:
    is_path = source.endswith(SUFFIXES) or glob.has_magic(source) or Path(source).exists()
    return is_path and source not in ("stdlib", "fineweb-edu")


def _chunks(begin: Cursor, records: Iterator[Record]) -> Iterator[Chunk]:
    values: list[Value] = []
    length, end, progress = 0, begin, None
    for value, end, progress in records:
        values.append(value)
        length += len(value or b"")
        if length >= CHUNK_BYTES or len(values) == CHUNK_RECORDS:
            yield Chunk(begin, end, values, progress)
            begin, values, length = end, [], 0
    if values:
        yield Chunk(begin, end, values, progress)


def _read_ahead(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The same chunks, read by a thread of their own while the caller works; an error comes out where it occurred."""
    ready: queue.Queue[Chunk | BaseException | None] = queue.Queue(READ_AHEAD_CHUNKS)
    stopped = threading.Event()

    def put(item: Chunk | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.5)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for chunk in chunks:
                put(chunk)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=work, name="documents", daemon=True).start()  # daemon: it may be waiting for the network
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()


# -- files on this machine ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileSource:
    """Files of this machine, in a fixed order."""

    label: str
    paths: tuple[Path, ...]
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

    def read(self, begin: Cursor | None) -> Iterator[Chunk]:
        begin = begin or {"file": 0, "record": 0}
        return _read_ahead(_chunks(begin, self._records(**begin)))

    def _records(self, file: int, record: int) -> Iterator[Record]:
        sizes = [path.stat().st_size for path in self.paths]
        total = max(sum(sizes), 1)
        for index in range(file, len(self.paths)):
            before, start = sum(sizes[:index]), record if index == file else 0
            for end, (value, part) in enumerate(file_records(self.paths[index], self.text_column, start), start + 1):
                yield value, {"file": index, "record": end}, (before + part * sizes[index]) / total


def _open_stdlib() -> FileSource:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    paths = tuple(root / name for name in names if left_out.isdisjoint(name.split("/")))
    if not paths:
        raise UserError(f"this Python keeps no .py files in {root}: name files of your own as --source")
    return FileSource("stdlib", paths, {"source": "stdlib", "python": platform.python_version()}, "text")


def _open_files(patterns: list[str], text_column: str) -> FileSource:
    paths: list[Path] = []
    for pattern in patterns:
        is_one = Path(pattern).exists()  # a name that exists is itself, whatever glob would make of its brackets
        found = [pattern] if is_one else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"there is no file {pattern}: correct the path of --source")
        paths += map(Path, found)
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name its files, for example {path / '*.jsonl'}")
        if not path.name.endswith(SUFFIXES):
            kinds = " ".join(SUFFIXES)
            raise UserError(f"{path} is of a kind that cannot be read: sources end in {kinds}, so convert it")
    label = re.sub(r"[^\w-]", "_", paths[0].name.split(".")[0]) if len(paths) == 1 else "corpus"
    return FileSource(label or "corpus", tuple(paths), {"source": canonical(patterns)[0]}, text_column)


def local_bytes(source: str | list[str]) -> int | None:
    """Size of all files that a source names; None for a source of another kind, and for files that are gone."""
    patterns = [source] if isinstance(source, str) else source
    if not all(_is_local(pattern) for pattern in patterns):
        return None
    try:
        return sum(path.stat().st_size for path in _open_files(patterns, "").paths)
    except (UserError, OSError):
        return None


# -- the hub -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubSource:
    """A dataset on the Hugging Face hub, streamed by `datasets` at one commit; it outlives outages of the network."""

    repo: str
    name: str | None
    revision: str
    """The commit, as a hash."""
    text_column: str
    documents: int | None
    """How many there are, if that is known: for the time left, nothing else."""
    dataset: Any = field(repr=False)

    @property
    def label(self) -> str:
        return "edufineweb" if self.first_shard_is_val else re.sub(r"[^\w-]", "_", self.repo.split("/")[1])

    @property
    def first_shard_is_val(self) -> bool:
        return self.repo == FINEWEB_EDU

    def identity(self) -> dict[str, Any]:
        return {"source": self.repo, "name": self.name, "revision": self.revision}

    def read(self, begin: Cursor | None) -> Iterator[Chunk]:
        return _read_ahead(self._persist(begin or {"file": 0, "record": 0, "documents": 0}))

    def _persist(self, begin: Cursor) -> Iterator[Chunk]:
        """The stream, taken up again after its last whole chunk for as long as the network may come back.

        `datasets` itself tries a lost connection again for some 100 s; this is for all that lasts longer.
        """
        failing_since: float | None = None
        pause = FIRST_PAUSE
        while True:
            try:
                for chunk in _chunks(begin, self._records(**begin)):
                    yield chunk
                    begin, failing_since, pause = chunk.end, None, FIRST_PAUSE
                return
            except UserError:
                raise
            except Exception as error:
                if failing_since is None:
                    failing_since = time.monotonic()
                patience = DAMAGE_SECONDS if isinstance(error, ValueError | LookupError | TypeError) else OUTAGE_SECONDS
                what = f"{self.repo} fails after document {begin['documents']} ({first_line(error)})"
                if time.monotonic() - failing_since + pause > patience:
                    raise UserError(f"{what}: run the same command again later, it goes on from there") from error
                print(f"{what}: trying again in {pause:.0f} s", file=sys.stderr)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def _records(self, file: int, record: int, documents: int) -> Iterator[Record]:
        """The records from a place on. To go on within a file it is read again, as by `datasets`' own saved states."""
        files = self.dataset.num_shards
        for index in range(file, files):
            skip, end = (record if index == file else 0), 0
            for table in self.dataset.shard(files, index).with_format("arrow").iter(batch_size=256):
                require_text(self.repo, self.text_column, table.schema)
                for value in texts(table.column(self.text_column)):
                    end += 1
                    if end > skip:
                        documents += 1
                        progress = documents / self.documents if self.documents else None
                        yield value, {"file": index, "record": end, "documents": documents}, progress


def _open_hub(repo: str, name: str | None, text_column: str, revision: str | None) -> HubSource:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = HfApi().dataset_info(repo, revision=revision).sha
        dataset = datasets.load_dataset(repo, name, split="train", streaming=True, revision=commit)
    except GatedRepoError as error:
        raise UserError(f"{repo} is gated: accept its terms on the hub and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision}: name another as --revision") from error
    except (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(f"the hub has no dataset {repo} that you may read: correct --source, or log in") from error
    except HfHubHTTPError as error:  # it was reached, and says no
        status = error.response.status_code if error.response is not None else 500
        mend = "run the same command again later" if status == 429 or status >= 500 else "log in with `hf auth login`"
        what = f"the hub does not give {repo} ({first_line(error)})"
        raise UserError(f"{what}: {mend}, or name another --source") from error
    except (ValueError, FileNotFoundError) as error:  # no such configuration, split or files: the message says more
        raise UserError(f"{repo} cannot be opened ({first_line(error)}): correct --source or --name") from error
    except Exception as error:  # all that a network can do
        what = f"the hub cannot be reached for {repo} ({first_line(error)})"
        raise UserError(f"{what}: check the network, or name local files as --source") from error
    assert commit is not None
    splits = dataset.info.splits or {}
    documents = splits["train"].num_examples if "train" in splits else None
    if repo == FINEWEB_EDU and name:
        documents = documents or FINEWEB_EDU_DOCUMENTS.get(name)
    return HubSource(repo, name, commit, text_column, documents, dataset)
