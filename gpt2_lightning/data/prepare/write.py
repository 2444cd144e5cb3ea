"""Writes documents as token shards: at the tokenizer's speed, restartable, with the same bytes every time.

The caller's thread reads documents and writes shards; a pool of threads tokenizes in between (tiktoken releases the
GIL).

How it resumes. A batch of documents that completes a shard is followed by a checkpoint: the tokens of the unfinished
train and val shard are written to hidden files (`.partial_NAME`), then the manifest, which lists the finished shards,
the position in the source after the batch, and the length of each hidden file. Each file is written atomically. A run
that was killed starts at the last manifest. Shards that were finished after it are written again, with the same bytes.
Hidden files that were written after it are longer than it says, but begin with the same tokens. The hidden train file
holds the rest of one batch. The hidden val file grows up to a whole shard, because one document in 100 is val. With
shards of 100M tokens it has 50M on average, which takes 0.1 s of the CPU (0.4 s with the sync to a busy disk) for each
train shard; to tokenize a train shard takes one core 33 s.
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

from gpt2_lightning.data.prepare.encode import COUNTED, VAL_EVERY, batch_documents, encode_batches
from gpt2_lightning.data.prepare.sources import Source, canonical_name, local_bytes, open_source, split_revision
from gpt2_lightning.data.shards import (
    Manifest,
    ShardEntry,
    Split,
    check_sizes,
    find_shards,
    open_shard,
    read_manifest,
    write_manifest,
    write_shard,
)
from gpt2_lightning.errors import UserError
from gpt2_lightning.files import try_lock
from gpt2_lightning.tokenizer import RANKS_SHA256

LOCK_NAME = ".lock"
PARTIAL_PREFIX = ".partial_"


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
    """Tokenizes a source into the folder ``out``: shards of ``shard_tokens`` tokens and ``manifest.json``.

    The bytes depend only on the documents and the options. If a run is killed or the disk is full, the same call
    resumes after the last finished train shard; a complete folder returns at once. If several processes prepare the
    same folder, one works and the others wait for it.

    Args:
        source: ``stdlib``, ``fineweb-edu``, ``ORG/NAME`` or ``ORG/NAME@REVISION`` on the hub, or files (.txt, .jsonl,
            .jsonl.gz, .jsonl.xz, .parquet): a path, a glob, or a list of them, read in that order, the files of a glob
            sorted by name.
        out: the folder; created if it does not exist.
        name: configuration of a hub dataset; sample-10BT by default for fineweb-edu.
        text_column: the column or key that holds the text.
        revision: branch, tag or commit of a hub dataset.
        shard_tokens: tokens in each shard but the last of a split.
        workers: tokenizer threads; by default one for each core that this process may use. Does not change the bytes.
        format: ``npy`` as in build-nanogpt, or ``bin`` as in llm.c.
        progress: show a progress bar on stderr.

    Raises:
        UserError: the source cannot be read or is empty, or the folder cannot be written or holds shards made with
            other options. Finished shards are kept.
    """
    assert shard_tokens > 0, shard_tokens
    out = Path(out)
    source, revision = split_revision(source, revision)
    canonical, name = canonical_name(source, name)
    options: dict[str, Any] = {"source": canonical, "name": name, "revision": revision, "text_column": text_column}
    options |= {"shard_tokens": shard_tokens, "format": format}
    try:
        manifest = _read_matching_manifest(out, options)
        if manifest is None or not manifest.complete:
            out.mkdir(parents=True, exist_ok=True)
            with lock_folder(out):
                manifest = _read_matching_manifest(out, options)  # another process may have completed it meanwhile
                if manifest is None or not manifest.complete:
                    if manifest is not None:  # resume with the commit that the first run found
                        revision = manifest.source.get("revision")
                    opened = open_source(source, name=name, text_column=text_column, revision=revision)
                    manifest = _write_shards(opened, out, options, manifest, workers or _usable_cores(), progress)
        for leftover in (*out.glob(f"{PARTIAL_PREFIX}*"), out / LOCK_NAME):  # a complete folder needs neither
            with contextlib.suppress(OSError):  # no permission, or (Windows) another process has it open
                leftover.unlink()
        check_sizes(out)
        size = local_bytes(source)  # local files may have been deleted since, but must not have changed
        if size is not None:
            _require_equal(out, manifest.source, {"bytes": size})
        return manifest
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "free some space and run the same command again: finished shards are kept and it resumes after them"
        else:
            fix = "change its permissions or choose another folder"
        raise UserError(f"{out} cannot be written ({error.strerror}): {fix}") from error


def ensure_prepared(source: str | list[str], root: Path) -> None:
    """Prepares ``source`` into ``root`` unless it is there already; `fit` calls it before it reads ``root``.

    Published shards (without a manifest) are used as they are. A folder that was prepared before keeps its shard
    length, format and columns. Errors as in `prepare`.
    """
    manifest = read_manifest(root)
    if manifest is None:
        if not find_shards(root):
            prepare(source, root)
        return
    options = {key: value for key, value in manifest.options.items() if key != "source"}
    if split_revision(source, None)[1] is not None:
        del options["revision"]
    prepare(source, root, **options)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_matching_manifest(out: Path, options: dict[str, Any]) -> Manifest | None:
    """The folder's manifest, or None if it holds no shards yet. ``UserError`` if other options made the shards."""
    manifest, shards = read_manifest(out), find_shards(out)
    if not shards and (manifest is None or not manifest.complete):
        return None
    if manifest is None:
        raise UserError(f"{out} holds shards without a manifest, which cannot be added to: choose another --out")
    if options["revision"] in (None, manifest.source.get("revision")):  # no revision, or the commit that was found
        options = options | {"revision": manifest.options["revision"]}
    _require_equal(out, manifest.options, options)
    return manifest


def _require_equal(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    different = [f"{key} is {there.get(key)} there and {here[key]} here" for key in here if there.get(key) != here[key]]
    if different:
        raise UserError(
            f"{out} holds shards of another source or with other options ({'; '.join(different)}): choose another "
            "folder, or delete this one"
        )


@contextlib.contextmanager
def lock_folder(root: Path) -> Iterator[None]:
    """Waits until no other process prepares ``root``. The system releases the lock however the process ends."""
    with (root / LOCK_NAME).open("ab") as file:
        if not try_lock(file, of_process=False):
            print(f"another process is preparing {root}: waiting for it to end", file=sys.stderr)
            while not try_lock(file, of_process=False):
                time.sleep(0.5)
        yield


class ShardWriter:
    """Collects the tokens of one split and writes them as shards of ``shard_tokens``.

    Args:
        shard: number of the shard to begin with.
        tokens: how many tokens of that shard an earlier run has saved.
    """

    def __init__(self, root: Path, label: str, split: Split, options: dict[str, Any], shard: int, tokens: int) -> None:
        self.root, self.label, self.split, self.suffix = root, label, split, options["format"]
        self.shard, self.filled = shard, 0
        self.buffer = np.empty(options["shard_tokens"], dtype=np.uint16)  # memory is allocated as it is filled
        if tokens:
            if not self._partial.exists():
                raise UserError(f"{self._partial} is missing: delete the folder {root} and prepare it again")
            self.add(open_shard(self._partial)[:tokens])

    @property
    def _name(self) -> str:
        split = self.split if self.shard else "val"  # shard 0 is always val
        return f"{self.label}_{split}_{self.shard:06d}.{self.suffix}"

    @property
    def _partial(self) -> Path:
        return self.root / f"{PARTIAL_PREFIX}{self._name}"

    def add(self, tokens: np.ndarray) -> list[ShardEntry]:
        """Adds 1-D uint16 tokens; returns the entries of the shards that they completed."""
        finished: list[ShardEntry] = []
        while len(tokens):
            count = min(len(tokens), len(self.buffer) - self.filled)
            self.buffer[self.filled : self.filled + count] = tokens[:count]
            self.filled += count
            tokens = tokens[count:]
            if self.filled == len(self.buffer):
                finished += self.finish()
        return finished

    def finish(self) -> list[ShardEntry]:
        """Writes the tokens collected so far as a shard; returns its entry, or none if there are no tokens."""
        if self.filled == 0:
            return []
        sha256 = write_shard(self.root / self._name, self.buffer[: self.filled])
        entry = ShardEntry(self._name, self.filled, sha256)
        self.shard, self.filled = self.shard + 1, 0
        return [entry]

    def save(self) -> dict[str, int]:
        """Saves the unfinished shard; returns the arguments with which another writer continues it."""
        if self.filled:
            write_shard(self._partial, self.buffer[: self.filled])
        return {"shard": self.shard, "tokens": self.filled}


def _write_shards(
    source: Source, out: Path, options: dict[str, Any], manifest: Manifest | None, workers: int, progress: bool
) -> Manifest:
    """Writes the shards that ``manifest`` does not list yet. The caller holds the lock."""
    hold_out = not source.first_shard_is_val
    identity = source.identity()
    if manifest is None:
        split = f"every {VAL_EVERY}th document is val, from the first on" if hold_out else "the first shard is val"
        start = {"cursor": None, "train": {"shard": int(hold_out), "tokens": 0}, "val": {"shard": 0, "tokens": 0}}
        manifest = Manifest(identity, RANKS_SHA256, options, split, dict.fromkeys(COUNTED, 0), (), start)
        write_manifest(out, manifest)
    _require_equal(out, manifest.source | {"tokenizer": manifest.tokenizer}, identity | {"tokenizer": RANKS_SHA256})
    resume = manifest.resume or {}
    if resume.keys() != {"cursor", "train", "val"}:
        raise UserError(f"another version of this program prepared {out} in part: delete it and prepare it again")
    train = ShardWriter(out, source.label, "train", options, **resume["train"])
    val = ShardWriter(out, source.label, "val", options, **resume["val"])
    entries, documents = list(manifest.shards), dict(manifest.documents)
    tokens = sum(entry.tokens for entry in entries) + train.filled + val.filled

    batches = batch_documents(source.read(resume["cursor"]), first=documents["kept"])
    with tqdm(initial=tokens, unit="tok", unit_scale=True, disable=not progress, dynamic_ncols=True) as bar:
        for batch, train_tokens, val_tokens in encode_batches(batches, hold_out, workers):
            documents = {key: documents[key] + batch.counts[key] for key in COUNTED}
            finished = train.add(train_tokens) + val.add(val_tokens)
            if finished:
                entries += finished
                resume = {"cursor": batch.end, "train": train.save(), "val": val.save()}
                manifest = replace(manifest, documents=documents, shards=_sorted(entries), resume=resume)
                write_manifest(out, manifest)
            tokens += len(train_tokens) + len(val_tokens)
            bar.total = round(tokens / batch.progress) if batch.progress else None
            bar.set_postfix_str(f"{documents['kept']:,} documents", refresh=False)
            bar.update(tokens - bar.n)

    if documents["kept"] == 0:
        raise UserError(
            f"{options['source']} has no text ({documents['null']} null and {documents['empty']} empty documents): "
            "choose another --source"
        )
    if train.shard == 0 or (train.shard == 1 and train.filled == 0):  # all tokens are in shard 0, which is val
        raise UserError(
            f"{options['source']} has only {tokens} tokens, too few for a val and a train shard: lower --shard_tokens"
        )
    entries += train.finish() + val.finish()
    if hold_out and documents["kept"] == 1:
        manifest = replace(manifest, split="the last tenth of the only document is val")
    manifest = replace(manifest, documents=documents, shards=_sorted(entries), resume=None)
    write_manifest(out, manifest)
    return manifest


def _sorted(entries: list[ShardEntry]) -> tuple[ShardEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.file))
