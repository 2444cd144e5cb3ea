"""Token shards on disk: build-nanogpt's ``.npy`` and llm.c's ``.bin``, a stream over many of them, and their manifest.

A folder of shards is the unit. Names tell the split (``…val_000000.npy``, ``…train_000001.npy``), tokens are
little-endian uint16, and ``manifest.json``, where there is one, says what the shards were made from and what must be in
them. Folders that others published have no manifest and are read as they are.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from gpt2_lightning.errors import UserError
from gpt2_lightning.files import atomic_file

Split = Literal["train", "val"]

BIN_MAGIC, BIN_VERSION, BIN_HEADER_BYTES = 20240520, 1, 256 * 4  # llm.c's: 256 int32, then the tokens
NPY_HEADER_BYTES = 12 + 10_000  # magic, version, length; numpy takes no header of more than 10,000 characters
MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
MAX_OPEN_SHARDS = (
    16  # an open memory map holds a file descriptor: macOS grants 256 in all, and every worker has its own
)
_AGAIN = "fetch or prepare it again"


# -- writing -----------------------------------------------------------------------------------------------------------


def _header(suffix: str, count: int) -> bytes:
    if suffix == ".bin":
        header = np.zeros(256, dtype="<i4")
        header[:3] = BIN_MAGIC, BIN_VERSION, count
        return header.tobytes()
    assert suffix == ".npy", suffix
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<u2", "fortran_order": False, "shape": (count,)})
    return buffer.getvalue()


def write_shard(path: Path, tokens: np.ndarray) -> str:
    """Write 1-D uint16 ``tokens`` in the format that ``path``'s suffix names, atomically; returns the file's sha256."""
    assert (tokens.ndim, tokens.dtype) == (1, np.uint16), (tokens.ndim, tokens.dtype)
    data: Any = np.ascontiguousarray(tokens, dtype="<u2").view(np.uint8).data
    size = 1 << 24  # hash each piece while it is still in the cache
    digest = hashlib.sha256()
    with atomic_file(path) as file:
        for piece in (_header(path.suffix, len(tokens)), *(data[i : i + size] for i in range(0, len(data), size))):
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


# -- reading -----------------------------------------------------------------------------------------------------------


def _split_of(name: str) -> str | None:
    """The split that a shard's name tells by its last ``train`` or ``val`` (medieval_train_000001 is train)."""
    found = re.findall("train|val", Path(name).stem)
    return found[-1] if found and name.endswith((".npy", ".bin")) and not name.startswith(".") else None


def find_shards(root: Path) -> list[Path]:
    """All shards of a folder, of both splits and formats, sorted by name; none where there is no such folder."""
    return sorted(path for path in root.glob("*") if _split_of(path.name)) if root.is_dir() else []


def list_shards(root: Path, split: Split) -> list[Path]:
    """The shards of one split, sorted by name. ``ValueError`` if there are none or the folder mixes formats."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}: make it with `gpt2 prepare --out {root}`, or correct data.root")
    shards = find_shards(root)
    if len({path.suffix for path in shards}) > 1:
        raise UserError(f"{root} mixes .npy and .bin shards: keep one format in a folder")
    if not (chosen := [path for path in shards if _split_of(path.name) == split]):
        raise UserError(
            f"{root} holds no {split} shard (a .npy or .bin file with {split!r} in its name): prepare it again"
        )
    return chosen


def _npy_layout(file: BinaryIO) -> tuple[int, int]:
    head = io.BytesIO(file.read(NPY_HEADER_BYTES))  # of the file itself numpy reads what a header asks for, up to 4 GB
    try:
        version = np.lib.format.read_magic(head)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(head)
    except Exception:  # what a damaged header raises depends on the byte: SyntaxError, IndexError, MemoryError, …
        raise UserError("it does not begin with the header of a .npy file") from None
    if dtype != np.dtype("<u2"):
        raise UserError(f"its tokens are {dtype}, not little-endian uint16")
    if len(shape) != 1:
        raise UserError(f"its array has {len(shape)} dimensions, not 1")
    return head.tell(), int(shape[0])


def _bin_layout(file: BinaryIO) -> tuple[int, int]:
    header = np.frombuffer(file.read(BIN_HEADER_BYTES), dtype="<i4")
    if len(header) < 256:
        raise UserError("it ends inside its header")
    if header[0] != BIN_MAGIC:
        raise UserError(f"its magic number is {header[0]}, not {BIN_MAGIC}: not llm.c's GPT-2 format")
    if header[1] != BIN_VERSION:
        raise UserError(f"its version is {header[1]}, not {BIN_VERSION}")
    return BIN_HEADER_BYTES, int(header[2])


def open_shard(path: Path) -> np.ndarray:
    """The tokens of one shard, 1-D uint16, memory-mapped; only the header and the file's size are looked at.

    ``ValueError`` if the file is missing, foreign, not 1-D uint16, or does not end where its header says.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError("it is no file")  # nobody may ever write into a pipe
        with path.open("rb") as file:
            offset, count = _npy_layout(file) if path.suffix == ".npy" else _bin_layout(file)
            size = file.seek(0, io.SEEK_END)
        if size != offset + 2 * count:
            raise UserError(f"its header promises {count} tokens ({offset + 2 * count} bytes), but it has {size} bytes")
        if count == 0:
            raise UserError("it holds no tokens")
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give this user the right to") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} is not a whole shard: {reason}; {_AGAIN}") from error
    return np.memmap(path, dtype="<u2", mode="r", offset=offset, shape=(count,))


class TokenStream:
    """The concatenation of shards as one long array of tokens, read in windows.

    It pickles as its paths and lengths alone, and opens shards when they are touched, so that worker processes of
    either start method get maps of their own.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(Path(path) for path in paths)
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
                del self._maps[next(iter(self._maps))]
            self._maps[index] = open_shard(self.paths[index]).view(np.ndarray)  # slices of a plain array cost a tenth
        return self._maps[index]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens ``[start, start + length)`` for each of ``starts``: (len(starts), length) uint16, a copy."""
        starts = np.asarray(starts, dtype=np.int64)
        assert len(starts) == 0 or (starts.min() >= 0 and starts.max() + length <= len(self)), (
            "window outside the stream"
        )
        out = np.empty((len(starts), length), dtype=np.uint16)
        shards = np.searchsorted(self._ends, starts, side="right")
        for row, start, shard in zip(out, starts.tolist(), shards.tolist(), strict=True):
            begin = start - (int(self._ends[shard]) - self.lengths[shard])
            filled = 0
            while filled < length:  # a window may run across the border of two shards, or of many short ones
                piece = self._shard(shard)[begin : begin + length - filled]
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                shard, begin = shard + 1, 0
        return out


# -- manifest ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest promises about one shard."""

    file: str
    """Its name in the folder."""
    tokens: int
    sha256: str
    """Of the whole file, header included."""


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards was made from, and what must be in it. The same input gives the same manifest."""

    source: dict[str, Any]
    """Where the documents came from, down to the revision or the files' hash."""
    tokenizer: str
    """sha256 of the tokenizer's rank table."""
    options: dict[str, Any]
    """What was asked for: the source as it was named, columns, shard length, format."""
    split: str
    """Which documents are held out, in words."""
    documents: dict[str, int]
    """Counts: kept, skipped as null or empty, and replaced (kept, with U+FFFD where they were not UTF-8)."""
    shards: tuple[ShardEntry, ...]
    resume: dict[str, Any] | None
    """Where an unfinished preparation goes on; None when the folder is complete."""

    @property
    def complete(self) -> bool:
        return self.resume is None

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards if _split_of(shard.file) == split)


def write_manifest(root: Path, manifest: Manifest) -> None:
    with atomic_file(root / MANIFEST_NAME) as file:
        file.write((json.dumps({"version": MANIFEST_VERSION} | asdict(manifest), indent=2) + "\n").encode())


def read_manifest(root: Path) -> Manifest | None:
    """The folder's manifest, or None where there is none. ``ValueError`` if it cannot be trusted."""
    path = Path(root) / MANIFEST_NAME
    try:
        values = json.loads(path.read_bytes())
        if values.pop("version") != MANIFEST_VERSION:
            raise UserError("another version wrote it")
        shards = tuple(ShardEntry(**shard) for shard in values.pop("shards"))
        manifest = Manifest(shards=shards, **values)
        _require_kinds(manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give this user the right to") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise not_to_be_trusted(root, " ".join(str(error).split())) from error
    return manifest


def not_to_be_trusted(root: Path, reason: str) -> ValueError:
    """What to raise where a folder's manifest makes no sense."""
    return ValueError(
        f"{Path(root) / MANIFEST_NAME} cannot be read ({reason}): prepare into another folder, or delete this one"
    )


def _require_kinds(manifest: Manifest) -> None:
    kinds = {"source": dict, "tokenizer": str, "options": dict, "split": str, "documents": dict, "resume": dict | None}
    for name, kind in kinds.items():
        if not isinstance(getattr(manifest, name), kind):  # type: ignore[arg-type]
            raise UserError(f"its {name} is a {type(getattr(manifest, name)).__name__}")
    for shard in manifest.shards:
        # a name with a separator in it could lead out of the folder, on this or on another system
        if not re.fullmatch(r"[\w.-]+", shard.file) or not _split_of(shard.file):
            raise UserError(f"{shard.file!r} is not a shard's name")
        if type(shard.tokens) is not int or shard.tokens < 1:
            raise UserError(f"{shard.file} has {shard.tokens!r} tokens there")
        if not re.fullmatch("[0-9a-f]{64}", shard.sha256):
            raise UserError(f"{shard.file} has {shard.sha256!r} there, which is no sha256")
    if len({shard.file for shard in manifest.shards}) < len(manifest.shards):
        raise UserError("it lists a shard twice")


def _wrong_names(root: Path, manifest: Manifest) -> list[str]:
    listed, present = {shard.file for shard in manifest.shards}, {path.name for path in find_shards(root)}
    return [f"{name} is missing" for name in sorted(listed - present)] + [
        f"{name} is not in the manifest" for name in sorted(present - listed)
    ]


def _require(root: Path, wrong: list[str]) -> None:
    if wrong:
        raise UserError(
            f"{root} is not what its {MANIFEST_NAME} says ({'; '.join(wrong)}): delete it and prepare it again"
        )


def check_sizes(root: Path) -> None:
    """The cheap check before a run: every shard's header against its size, and against the manifest if there is one.

    ``ValueError`` names what is wrong. Reads headers only: milliseconds for a hundred shards.
    """
    root = Path(root)
    manifest = read_manifest(root)
    lengths = {path.name: len(open_shard(path)) for path in find_shards(root)}
    if manifest is None:
        return
    if not manifest.complete:
        raise UserError(
            f"{root} is only partly prepared: run the same `gpt2 prepare` again, it goes on where it stopped"
        )
    wrong = _wrong_names(root, manifest)
    for shard in manifest.shards:
        if lengths.get(shard.file, shard.tokens) != shard.tokens:
            wrong.append(f"{shard.file} has {lengths[shard.file]} tokens, not {shard.tokens}")
    _require(root, wrong)


def verify(root: Path) -> Manifest:
    """The full check: ``check_sizes``, then the sha256 of every shard. Returns the manifest, or ``ValueError``."""
    root = Path(root)
    check_sizes(root)
    manifest = read_manifest(root)
    if manifest is None:
        list_shards(root, "train")  # a folder that holds none says so
        raise UserError(
            f"{root} has no {MANIFEST_NAME} to verify against: its shards can be read, but not vouched for, so prepare "
            "them again to be sure"
        )
    wrong = []
    for shard in manifest.shards:
        with (root / shard.file).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                wrong.append(f"{shard.file} has another sha256")
    _require(root, wrong)
    return manifest
