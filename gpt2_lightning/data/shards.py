"""Token shards on disk: build-nanogpt's ``.npy`` and llm.c's ``.bin``, a stream over many shards, and their manifest.

A folder holds the shards of one dataset. Their names tell the split (``…val_000000.npy``, ``…train_000001.npy``), their
tokens are little-endian uint16. ``manifest.json`` says what `gpt2 prepare` made the shards from and what the folder has
to hold. Published folders have no manifest and are read as they are.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt2_lightning.errors import UserError
from gpt2_lightning.files import atomic_file

Split = Literal["train", "val"]

BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 256 * 4  # llm.c: 256 int32, the third is the number of tokens
MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
MAX_OPEN_SHARDS = 16
"""Memory maps that a stream keeps open. Each holds a file descriptor; macOS allows 256, and each worker has its own."""


# -- one shard ---------------------------------------------------------------------------------------------------------


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Writes tokens (n,) uint16 atomically, in the format of ``path``'s suffix. Returns the file's sha256."""
    assert (tokens.ndim, tokens.dtype) == (1, np.uint16), (tokens.ndim, tokens.dtype)
    header = io.BytesIO()
    if path.suffix == ".bin":
        header.write(np.array([BIN_MAGIC, BIN_VERSION, len(tokens)] + [0] * 253, dtype="<i4").tobytes())
    else:
        fields = {"descr": "<u2", "fortran_order": False, "shape": tokens.shape}
        np.lib.format.write_array_header_1_0(header, fields)
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for data in (header.getvalue(), np.ascontiguousarray(tokens, dtype="<u2").data):
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def open_shard(path: Path) -> np.ndarray:
    """Memory-maps the tokens of a shard, (n,) uint16. Reads the header only.

    Raises:
        UserError: the file is missing, damaged or of another format, or its size is not what its header says.
    """
    try:
        tokens = np.lib.format.open_memmap(path, mode="r") if path.suffix == ".npy" else _map_bin(path)
        expected, size = tokens.offset + tokens.nbytes, path.stat().st_size
        if tokens.dtype != np.dtype("<u2") or tokens.ndim != 1:
            raise ValueError(f"it holds {tokens.dtype} in {tokens.ndim} dimension(s), not little-endian uint16 in one")
        if size != expected:
            raise ValueError(f"its header promises {len(tokens)} tokens ({expected} bytes), but it has {size} bytes")
        if len(tokens) == 0:
            raise ValueError("it holds no tokens")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # NumPy raises many kinds for a damaged header, depending on the byte
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a whole shard: {reason}; download or prepare it again") from error
    return tokens


def _map_bin(path: Path) -> np.memmap:
    magic, version, count = np.fromfile(path, "<i4", 256)[:3].tolist()
    if (magic, version) != (BIN_MAGIC, BIN_VERSION):
        raise ValueError(
            f"its magic number is {magic} and its version {version}, not {BIN_MAGIC} and {BIN_VERSION} as in llm.c's "
            "GPT-2 shards"
        )
    return np.memmap(path, "<u2", mode="r", offset=BIN_HEADER_BYTES, shape=(count,))


# -- many shards -------------------------------------------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """The split of a shard by the last ``train`` or ``val`` in its name; None if the file is not a shard.

    The last one, because a dataset's own name may hold another: medieval_train_000001.npy.
    """
    found = re.findall("train|val", Path(name).stem)
    return found[-1] if found and name.endswith((".npy", ".bin")) and not name.startswith(".") else None


def find_shards(root: Path) -> list[Path]:
    """All shards in a folder, of both splits and formats, sorted by name; empty if there is no such folder."""
    return sorted(path for path in root.glob("*") if split_of(path.name))


def list_shards(root: Path, split: Split) -> list[Path]:
    """The shards of one split, sorted by name.

    Raises:
        UserError: there is none, or the folder mixes formats.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: make it with `gpt2 prepare --out {root}`, or correct data.root")
    shards = find_shards(root)
    if len({path.suffix for path in shards}) > 1:
        raise UserError(f"{root} mixes .npy and .bin shards: keep one format in a folder")
    chosen = [path for path in shards if split_of(path.name) == split]
    if not chosen:
        raise UserError(
            f"{root} holds no {split} shard (a .npy or .bin file with {split!r} in its name): prepare it again"
        )
    return chosen


class TokenStream:
    """The tokens of many shards as one long sequence.

    Shards are opened when they are first read. Pickling drops the open maps, so each DataLoader worker has its own.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.lengths = tuple(len(open_shard(path)) for path in self.paths)
        """Tokens of each shard."""
        self._ends = np.cumsum(self.lengths)
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def _shard(self, index: int) -> np.ndarray:
        if index not in self._maps:
            if len(self._maps) == MAX_OPEN_SHARDS:
                del self._maps[next(iter(self._maps))]  # the one that was opened first
            self._maps[index] = open_shard(self.paths[index]).view(np.ndarray)  # slices ten times faster than a memmap
        return self._maps[index]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Copies tokens ``[start, start + length)`` for each of ``starts``: (len(starts), length) uint16."""
        assert len(starts) == 0 or (starts.min() >= 0 and starts.max() + length <= len(self)), "outside the stream"
        out = np.empty((len(starts), length), dtype=np.uint16)
        shards = np.searchsorted(self._ends, starts, side="right")
        for row, start, shard in zip(out, starts.tolist(), shards.tolist(), strict=True):
            begin = start - (int(self._ends[shard]) - self.lengths[shard])
            filled = 0
            while filled < length:  # a read may cross the border of two shards, or span several short ones
                piece = self._shard(shard)[begin : begin + length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                shard, begin = shard + 1, 0
        return out


# -- manifest ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says about one shard."""

    file: str
    """Its name in the folder."""
    tokens: int
    sha256: str
    """Of the whole file, header included."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards was made from, and what it has to hold. The same input gives the same manifest."""

    source: dict[str, Any]
    """Where the documents came from, down to the revision or the hash of the files."""
    tokenizer: str
    """sha256 of the tokenizer's rank table."""
    options: dict[str, Any]
    """The arguments of `gpt2 prepare`: source as typed, columns, shard length, format."""
    split: str
    """Which documents are held out for validation, in words."""
    documents: dict[str, int]
    """Number of documents: kept, skipped as null or empty, and replaced (kept, with U+FFFD for invalid UTF-8)."""
    shards: tuple[ShardEntry, ...]
    resume: dict[str, Any] | None
    """Where an interrupted preparation resumes; None when the folder is complete."""

    @property
    def complete(self) -> bool:
        return self.resume is None

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards if split_of(shard.file) == split)


def write_manifest(root: Path, manifest: Manifest) -> None:
    with atomic_file(root / MANIFEST_NAME) as file:
        file.write((json.dumps({"version": MANIFEST_VERSION} | asdict(manifest), indent=2) + "\n").encode())


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a folder, or None if it has none.

    Raises:
        UserError: the file is damaged, or another version wrote it.
    """
    path = root / MANIFEST_NAME
    try:
        values = json.loads(path.read_bytes())
        version = values.pop("version")
        if version != MANIFEST_VERSION:
            raise ValueError(f"version {version}")
        shards = tuple(ShardEntry(**shard) for shard in values.pop("shards"))
        return Manifest(shards=shards, **values)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest ({error!r}): delete {root} and prepare it again") from error


def check_sizes(root: Path) -> Manifest | None:
    """Checks every shard's size against its header, and names and lengths against the manifest if there is one.

    Reads headers only: milliseconds for a hundred shards. Returns the manifest, or None without one.

    Raises:
        UserError: names what is wrong.
    """
    manifest = read_manifest(root)
    found = {path.name: len(open_shard(path)) for path in find_shards(root)}
    if manifest is None:
        return None
    if not manifest.complete:
        raise UserError(
            f"{root} is only partly prepared: run the same `gpt2 prepare` again, it resumes where it stopped"
        )
    listed = {shard.file: shard.tokens for shard in manifest.shards}
    wrong = [f"{name} is missing" for name in sorted(listed.keys() - found.keys())]
    wrong += [f"{name} is not in the manifest" for name in sorted(found.keys() - listed.keys())]
    for name in sorted(listed.keys() & found.keys()):
        if found[name] != listed[name]:
            wrong.append(f"{name} has {found[name]} tokens, not {listed[name]}")
    _raise_if(wrong, root)
    return manifest


def verify(root: Path) -> Manifest:
    """The full check of ``gpt2 prepare --verify``: ``check_sizes``, then the sha256 of every shard.

    Raises:
        UserError: names what is wrong, or says that there is no manifest.
    """
    manifest = check_sizes(root)
    if manifest is None:
        list_shards(root, "train")  # raises if there is no folder or no shard
        raise UserError(
            f"{root} has no {MANIFEST_NAME} to verify against: its shards can be read; to be sure of their content, "
            "prepare them again"
        )
    wrong = []
    for shard in manifest.shards:
        with (root / shard.file).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                wrong.append(f"{shard.file} has another sha256")
    _raise_if(wrong, root)
    return manifest


def _raise_if(wrong: list[str], root: Path) -> None:
    if wrong:
        raise UserError(f"{root} differs from its {MANIFEST_NAME} ({'; '.join(wrong)}): delete it and prepare it again")
