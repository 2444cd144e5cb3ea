"""Documents in, token shards out: at the tokenizer's speed, restartable, and to the same bytes every time.

A thread reads, a pool of threads tokenizes (tiktoken releases the GIL), and the caller's thread writes. Whenever a
train shard is whole, the manifest says where its last token came from; a preparation that was cut goes on from there.
"""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from gpt2_lightning.data.prepare.encode import COUNTED, VAL_EVERY, add_counts, batches_of, tokenized
from gpt2_lightning.data.prepare.sources import Source, canonical, local_bytes, open_source, pinned
from gpt2_lightning.data.shards import (
    Manifest,
    ShardEntry,
    Split,
    check_sizes,
    find_shards,
    not_to_be_trusted,
    read_manifest,
    write_manifest,
    write_shard,
)
from gpt2_lightning.errors import UserError
from gpt2_lightning.files import try_lock
from gpt2_lightning.tokenizer import RANKS_SHA256

LOCK_NAME = ".lock"

# -- tokens to shards --------------------------------------------------------------------------------------------------


class _Shards:
    """The shards of one split in the making: a buffer that is written out whenever it is full."""

    def __init__(self, root: Path, label: str, split: Split, index: int, options: dict[str, Any]) -> None:
        self.root, self.label, self.split, self.index, self.suffix = root, label, split, index, f".{options['format']}"
        self.buffer = np.empty(options["shard_tokens"], dtype=np.uint16)  # the system gives pages as they are filled
        self.filled = self.saved = 0

    @property
    def name(self) -> str:
        split = self.split if self.index else "val"  # shard 0 is val in either way of splitting
        return f"{self.label}_{split}_{self.index:06d}{self.suffix}"

    @property
    def part(self) -> Path:
        """The unfinished shard's tokens so far, as far as they were saved."""
        return self.root / f".{self.name}.part"

    def take(self, tokens: np.ndarray) -> int:
        """Fill up with ``tokens``; returns how many there was room for."""
        count = min(len(tokens), len(self.buffer) - self.filled)
        self.buffer[self.filled : self.filled + count] = tokens[:count]
        self.filled += count
        return count

    @property
    def full(self) -> bool:
        return self.filled == len(self.buffer)

    def finish(self) -> ShardEntry:
        """Write the shard and begin the next one."""
        sha256 = write_shard(self.root / self.name, self.buffer[: self.filled])
        entry = ShardEntry(self.name, self.filled, sha256)
        self.index, self.filled, self.saved = self.index + 1, 0, 0
        return entry

    def save(self) -> None:
        """Add what is new of the unfinished shard to its part file."""
        if self.filled == 0:
            return
        with self.part.open("ab") as file:
            file.truncate(2 * self.saved)  # what a run that was cut had added after its last manifest
            file.write(self.buffer[self.saved : self.filled].tobytes())
            file.flush()
            os.fsync(file.fileno())
        self.saved = self.filled

    def load(self, count: int) -> None:
        """Go on from the first ``count`` saved tokens."""
        if count == 0:
            self.part.unlink(missing_ok=True)  # of a run that was cut before its first manifest
            return
        size = self.part.stat().st_size if self.part.is_file() and not self.part.is_symlink() else 0
        if size < 2 * count or count > len(self.buffer):
            raise UserError(f"{self.part} is cut short: delete the folder {self.root} and prepare it again")
        self.saved = self.take(np.fromfile(self.part, dtype=np.uint16, count=count))


# -- the command -------------------------------------------------------------------------------------------------------


def prepare(
    source: str | list[str],
    out: Path,
    *,
    name: str | None = None,
    text_column: str = "text",
    revision: str | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    format: Literal["npy", "bin"] = "npy",
    progress: bool = True,
) -> Manifest:
    """Tokenize a source into the folder ``out``: shards of ``shard_tokens`` tokens and ``manifest.json``.

    The bytes depend on the documents and the options alone. A run that was cut, killed or out of space goes on after
    its last train shard when it is called again; a complete folder returns at once. Of processes that prepare one
    folder at the same time, one works and the others wait for it.

    Args:
        source: ``stdlib``, ``fineweb-edu``, ORG/NAME on the hub, or files; see `open_source`, as for the next three.
            ``ORG/NAME@REVISION`` is ORG/NAME at that revision.
        out: the folder; made if there is none.
        name: configuration of a hub dataset.
        text_column: the column or key that holds the text.
        revision: branch, tag or commit of a hub dataset.
        shard_tokens: tokens in each shard but a split's last.
        workers: tokenizer threads; by default one for each core that this process may use. No influence on the bytes.
        format: ``npy`` as build-nanogpt's, or ``bin`` as llm.c's.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the source cannot be read or is empty, the folder cannot be written or holds shards made otherwise.
            Whatever was finished stays.
    """
    out = Path(out)
    if not 1 <= shard_tokens < 2**31:  # what a .bin shard can say; one of them is held in memory
        raise UserError(f"shard_tokens is {shard_tokens}: give a whole number of at least 1, and below {2**31}")
    if (workers is not None and workers < 1) or format not in ("npy", "bin"):
        raise UserError(f"workers is {workers} and format {format}: give at least 1 worker, and npy or bin")
    source, revision = pinned(source, revision)
    where, name = canonical(source, name)
    options: dict[str, Any] = {"source": where, "name": name, "revision": revision, "text_column": text_column}
    options |= {"shard_tokens": shard_tokens, "format": format}
    try:
        manifest = _matching(out, options)
        left_locked = (out / LOCK_NAME).exists() and os.access(out, os.W_OK)  # else it is another user's, to be read
        if manifest is None or not manifest.complete or left_locked:
            out.mkdir(parents=True, exist_ok=True)
            with _lock(out):
                manifest = _matching(out, options)  # anew: we may have waited for another process to make it
                if manifest is None or not manifest.complete:
                    if manifest is not None:  # go on with the very commit that the first run found
                        revision = manifest.source.get("revision")
                    opened = open_source(source, name=name, text_column=text_column, revision=revision)
                    manifest = _prepare(opened, out, options, manifest, workers or _cores(), progress)
                for left in (*out.glob(".*.part"), out / LOCK_NAME):  # the lock last: it tells that there is more
                    with contextlib.suppress(PermissionError):  # Windows keeps a file that is open
                        left.unlink(missing_ok=True)
        check_sizes(out)
        size = local_bytes(source)  # shards outlive their source, but they must not pass for those of a later version
        if size not in (None, manifest.source.get("bytes")):
            _refuse_other(out, manifest.source, {"bytes": size})
        return manifest
    except OSError as error:
        raise UserError(_cannot_write(out, error)) from error


def ensure_prepared(source: str | list[str], root: Path) -> None:
    """What `fit` needs before it reads ``root``: shards of ``source``, prepared if they are missing.

    Shards that others published (no manifest) are taken as they are, and a folder that was prepared keeps its own shard
    length, format and columns. Errors as for `prepare`.
    """
    manifest = read_manifest(root)
    if manifest is None:
        if not find_shards(Path(root)):
            prepare(source, root)
    else:
        left_out = {"source"} if pinned(source)[1] is None else {"source", "revision"}
        options = _options_of(root, manifest)
        prepare(source, root, **{key: value for key, value in options.items() if key not in left_out})


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _matching(out: Path, options: dict[str, Any]) -> Manifest | None:
    """The folder's manifest if these options made it, None for a folder without shards; `ValueError` for another's."""
    manifest, shards = read_manifest(out), find_shards(out)
    if not shards and (manifest is None or not manifest.complete):
        return None  # nothing that other options could spoil
    if manifest is None:
        raise UserError(
            f"{out} holds shards without a manifest: they can be read, but not added to; choose another --out"
        )
    there = _options_of(out, manifest)
    same = options["revision"] in (None, manifest.source.get("revision"))  # the commit that was found is as good a name
    _refuse_other(out, there, options | {"revision": there["revision"]} if same else options)
    return manifest


def _options_of(out: Path, manifest: Manifest) -> dict[str, Any]:
    """What the folder was asked to be made with; `ValueError` where its manifest does not tell."""
    kinds: dict[str, Any] = {"source": str | list, "name": str | None, "revision": str | None, "text_column": str}
    kinds |= {"shard_tokens": int, "format": str}
    options = manifest.options
    if options.keys() != kinds.keys() or not all(isinstance(options[key], kind) for key, kind in kinds.items()):
        raise not_to_be_trusted(out, "its options are not those of gpt2 prepare")
    return options


def _resume_of(out: Path, manifest: Manifest) -> dict[str, Any]:
    """Where an unfinished preparation goes on; `ValueError` where its manifest does not tell."""
    resume, documents = manifest.resume, manifest.documents
    assert resume is not None
    cursor = resume.get("cursor")
    counts = [count for name, count in resume.items() if name != "cursor"] + [*documents.values()]
    if isinstance(cursor, dict):
        counts += cursor.values()
    if (
        bool(cursor) != bool(manifest.shards)  # at the beginning there is none
        or not isinstance(cursor, dict | None)
        or resume.keys() != {"cursor", "skip", "train_shard", "val_shard", "val_tokens"}
        or documents.keys() != set(COUNTED)
        or any(type(count) is not int or count < 0 for count in counts)
    ):
        raise not_to_be_trusted(out, "it does not tell where to go on")
    return resume


def _refuse_other(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    different = [f"{key} is {there.get(key)} there and {here[key]} here" for key in here if there.get(key) != here[key]]
    if different:
        what = " ".join("; ".join(different).split())  # one line, whatever stands there
        raise UserError(f"{out} holds shards made otherwise ({what}): choose another folder, or delete this one")


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Holds ``root`` against other processes. The lock is the system's: it goes with its process, however that ends."""
    with (root / LOCK_NAME).open("ab") as file:
        if not try_lock(file, of_process=False):
            print(f"another process is preparing {root}: waiting for it to end", file=sys.stderr)
            while not try_lock(file, of_process=False):
                time.sleep(0.5)
        yield


def _cannot_write(out: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        mend = "make room and run the same command again: the finished shards are intact, and it goes on after them"
    else:
        mend = "give this user the right to write there, or choose another folder"
    return f"{out} cannot be written ({error.strerror}): {mend}"


def _prepare(
    source: Source, out: Path, options: dict[str, Any], manifest: Manifest | None, workers: int, progress: bool
) -> Manifest:
    """Make all shards that ``manifest`` does not list yet; the caller holds the lock."""
    hold_out = not source.first_shard_is_val
    identity = source.identity()
    if manifest is None:
        split = f"every {VAL_EVERY}th document is val, from the first on" if hold_out else "the first shard is val"
        documents = dict.fromkeys(COUNTED, 0)
        start = {"cursor": None, "skip": 0, "train_shard": int(hold_out), "val_shard": 0, "val_tokens": 0}
        manifest = Manifest(identity, RANKS_SHA256, options, split, documents, (), start)
        write_manifest(out, manifest)
    _refuse_other(out, manifest.source | {"tokenizer": manifest.tokenizer}, identity | {"tokenizer": RANKS_SHA256})
    resume = _resume_of(out, manifest)
    train = _Shards(out, source.label, "train", resume["train_shard"], options)
    val = _Shards(out, source.label, "val", resume["val_shard"], options)
    val.load(resume["val_tokens"])
    entries, documents, skip = list(manifest.shards), manifest.documents, resume["skip"]
    done = sum(entry.tokens for entry in entries) + val.filled

    try:
        chunks = source.read(resume["cursor"])
    except TypeError:  # a place of another kind of source
        raise not_to_be_trusted(out, "it does not tell where to go on") from None
    batches = batches_of(chunks, first=documents["kept"])
    with _progress_bar(done, progress) as bar:
        for batch, train_tokens, val_tokens in tokenized(batches, hold_out, workers):
            before, documents = documents, add_counts(documents, batch.counts)
            used = min(skip, len(train_tokens))  # these lie in shards that are finished
            skip -= used
            done += len(train_tokens) - used + len(val_tokens)
            bar.total = round(done / batch.progress) if batch.progress else None
            bar.set_postfix_str(f"{documents['kept']:,} documents", refresh=False)
            bar.update(done - bar.n)
            while True:
                used += train.take(train_tokens[used:])
                if not train.full:
                    break
                entries.append(train.finish())
                val.save()
                resume = {"cursor": batch.begin, "skip": used, "train_shard": train.index}
                resume |= {"val_shard": val.index, "val_tokens": val.filled}  # val has none of this batch yet
                manifest = replace(manifest, documents=before, shards=_sorted(entries), resume=resume)
                write_manifest(out, manifest)
            used = val.take(val_tokens)
            while val.full:
                entries.append(val.finish())
                used += val.take(val_tokens[used:])

    if documents["kept"] == 0:
        raise UserError(
            f"{options['source']} holds no text ({documents['null']} null and {documents['empty']} empty documents): "
            "give another --source"
        )
    if train.index == 0 or (train.index == 1 and not train.filled):
        raise UserError(
            f"{options['source']} fills no train shard ({done} tokens, the first shard is val): lower shard_tokens"
        )
    entries += [shards.finish() for shards in (train, val) if shards.filled]
    split = "the last tenth of the only document is val" if hold_out and documents["kept"] == 1 else manifest.split
    manifest = replace(manifest, split=split, documents=documents, shards=_sorted(entries), resume=None)
    write_manifest(out, manifest)
    return manifest


def _sorted(entries: list[ShardEntry]) -> tuple[ShardEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.file))


def _progress_bar(tokens: int, shown: bool) -> "tqdm[Any]":
    calm = 0.1 if sys.stderr.isatty() else 10.0  # seconds between lines in a log file
    bar = tqdm(initial=tokens, unit="tok", unit_scale=True, mininterval=calm, disable=not shown, dynamic_ncols=True)
    bar._time = time.monotonic  # its own, the wall clock, may jump
    bar.start_t = bar.last_print_t = time.monotonic()
    return bar
