"""Shards on disk: their bytes, which files are refused, reads across shards, and what the manifest guarantees."""

import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gpt2_lightning.data.shards import (
    MAX_OPEN_SHARDS,
    Manifest,
    ShardEntry,
    TokenStream,
    check_sizes,
    list_shards,
    open_shard,
    read_manifest,
    verify,
    write_manifest,
    write_shard,
)
from gpt2_lightning.errors import UserError

TOKENS = np.array([50256, 0, 1, 258, 65535], dtype="<u2")
SUFFIXES = pytest.mark.parametrize("suffix", [".npy", ".bin"])


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing protects against power cuts, and takes most of the time of these tests."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def npy_bytes(array: np.ndarray = TOKENS) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def bin_bytes(tokens: np.ndarray = TOKENS, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """llm.c's format: 256 int32, then the tokens."""
    count = len(tokens) if count is None else count
    return struct.pack("<256i", magic, version, count, *[0] * 253) + tokens.tobytes()


BYTES: dict[str, Callable[[np.ndarray], bytes]] = {".npy": npy_bytes, ".bin": bin_bytes}


# -- one shard ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(hnp.arrays(np.uint16, st.integers(1, 90)), st.sampled_from([".npy", ".bin"]))
def test_a_written_shard_has_the_bytes_of_numpy_or_llmc_and_reads_back(tmp_path_factory, tokens, suffix):
    path = tmp_path_factory.mktemp("shard") / f"x_train_000001{suffix}"
    assert write_shard(path, tokens) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.read_bytes() == BYTES[suffix](tokens)
    read = open_shard(path)
    assert isinstance(read, np.memmap)
    assert (read.dtype, read.tolist()) == (np.dtype("<u2"), tokens.tolist())
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_write_keeps_the_old_shard_and_leaves_no_other_file(tmp_path, monkeypatch):
    path = tmp_path / "x_val_000000.npy"
    write_shard(path, TOKENS)

    def disk_full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, TOKENS[:2])
    assert open_shard(path).tolist() == TOKENS.tolist()
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.npy", npy_bytes()[:-1], "mmap length is greater than file size"),
        ("a.npy", npy_bytes()[:40], "EOF: reading array header"),
        ("a.npy", npy_bytes() + b"\0\0", r"its header promises 5 tokens \(138 bytes\), but it has 140 bytes"),
        ("a.npy", npy_bytes(TOKENS.astype(">u2")), "it holds >u2 in 1 dimension"),
        ("a.npy", npy_bytes(TOKENS.reshape(1, 5)), "it holds uint16 in 2 dimension"),
        ("a.npy", npy_bytes(TOKENS[:0]), "it holds no tokens"),
        ("a.npy", b"PK\x03\x04 something else", "the magic string is not correct"),
        ("a.bin", bin_bytes()[:-1], "mmap length is greater than file size"),
        ("a.bin", bin_bytes()[:1000], "mmap length is greater than file size"),
        ("a.bin", bin_bytes(count=4), r"its header promises 4 tokens \(1032 bytes\), but it has 1034 bytes"),
        ("a.bin", bin_bytes(magic=20240801), "its magic number is 20240801 and its version 1, not 20240520 and 1"),
        ("a.bin", bin_bytes(version=7), "its magic number is 20240520 and its version 7, not"),
    ],
)
def test_a_damaged_or_foreign_shard_is_named_with_the_reason(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not a whole shard: {reason}") as error:
        open_shard(path)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.npy cannot be read: No such file"):
        open_shard(tmp_path / "gone.npy")


@SUFFIXES
def test_no_changed_header_byte_and_no_other_length_gives_other_tokens(tmp_path, suffix):
    whole, path = BYTES[suffix](TOKENS), tmp_path / f"a{suffix}"

    def refused(content: bytes) -> bool:
        """True if the file is refused; else its tokens have to be those that were written."""
        path.write_bytes(content)
        try:
            tokens = open_shard(path).tolist()
        except UserError:
            return True
        assert tokens == TOKENS.tolist()
        return False

    assert not refused(whole)
    for at in range(72 if suffix == ".npy" else 12):  # the rest of the header is padding
        for byte in {*(whole[at] ^ 1 << bit for bit in range(8)), *b"\n#0"}:
            refused(whole[:at] + bytes([byte]) + whole[at + 1 :])
    for content in (*(whole[:length] for length in range(len(whole))), whole + b"\0", whole + b"\0\0", whole * 2):
        assert refused(content)


# -- many shards -------------------------------------------------------------------------------------------------------


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).touch()


def test_the_last_train_or_val_in_a_name_is_its_split(tmp_path):
    touch(tmp_path, "medieval_train_000002.bin", "medieval_train_000001.bin", "train_val_000000.bin", "val.bin")
    touch(tmp_path, "notes.bin", "train.txt", ".x_train_000003.bin", "manifest.json")
    names = {split: [path.name for path in list_shards(tmp_path, split)] for split in ("train", "val")}
    assert names["train"] == ["medieval_train_000001.bin", "medieval_train_000002.bin"]
    assert names["val"] == ["train_val_000000.bin", "val.bin"]


def test_a_missing_folder_a_missing_split_and_mixed_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere: make it with `gpt2 prepare"):
        list_shards(tmp_path / "nowhere", "train")
    touch(tmp_path, "e_train_000001.npy")
    with pytest.raises(ValueError, match="holds no val shard"):
        list_shards(tmp_path, "val")
    touch(tmp_path, "e_val_000000.bin")
    with pytest.raises(ValueError, match=r"mixes \.npy and \.bin"):
        list_shards(tmp_path, "train")


def make_stream(root: Path, lengths: list[int], suffix: str = ".npy") -> TokenStream:
    """Shards that together hold 0, 1, 2 …"""
    paths = [root / f"x_train_{number:06d}{suffix}" for number in range(len(lengths))]
    for path, end, length in zip(paths, np.cumsum(lengths), lengths, strict=True):
        write_shard(path, np.arange(end - length, end, dtype=np.uint16))
    return TokenStream(paths)


@given(st.data())
def test_every_read_is_a_slice_of_the_concatenated_shards(tmp_path_factory, data):
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    stream = make_stream(tmp_path_factory.mktemp("stream"), lengths, data.draw(st.sampled_from([".npy", ".bin"])))
    assert (len(stream), stream.lengths) == (sum(lengths), tuple(lengths))
    length = data.draw(st.integers(1, len(stream)))
    starts = data.draw(st.lists(st.integers(0, len(stream) - length), max_size=5))
    expected = [list(range(start, start + length)) for start in starts]
    tokens = stream.read(np.array(starts, dtype=np.int64), length)
    assert (tokens.dtype, tokens.tolist()) == (np.uint16, expected)


def test_a_read_outside_the_stream_fails(tmp_path):
    stream = make_stream(tmp_path, [5, 5])
    for start in (-1, 6):
        with pytest.raises(AssertionError, match="outside"):
            stream.read(np.array([start]), 5)


def first_tokens(stream: TokenStream) -> list[int]:
    return stream.read(np.array([3, 0]), 4)[:, 0].tolist()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_an_open_stream_works_in_another_process(tmp_path, method):
    if method == "fork" and sys.platform == "win32":
        pytest.skip("Windows has no fork")
    stream = make_stream(tmp_path, [5, 5])
    assert first_tokens(stream) == [3, 0]
    assert len(pickle.dumps(stream)) < 2000  # paths and lengths, no tokens
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert pool.submit(first_tokens, stream).result() == [3, 0]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_a_hundred_shards_keep_few_files_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    stream = make_stream(tmp_path, [3] * 100)
    assert len(os.listdir("/proc/self/fd")) == before
    assert stream.read(np.arange(295), 4)[:, 3].tolist() == list(range(3, 298))
    assert 0 < len(os.listdir("/proc/self/fd")) - before <= MAX_OPEN_SHARDS


# -- manifest ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder of one val and one train shard with a complete manifest."""
    entries = []
    for name, tokens in (("x_train_000001.npy", TOKENS), ("x_val_000000.npy", TOKENS[:2])):
        entries.append(ShardEntry(name, len(tokens), write_shard(tmp_path / name, tokens)))
    write_manifest(tmp_path, Manifest({"source": "x"}, "abc", {}, "in words", {"kept": 1}, tuple(entries), None))
    return tmp_path


def test_a_manifest_reads_back_and_counts_tokens(prepared):
    manifest = verify(prepared)
    assert read_manifest(prepared) == check_sizes(prepared) == manifest
    assert (manifest.complete, manifest.tokens("train"), manifest.tokens("val")) == (True, 5, 2)
    assert manifest.source == {"source": "x"}


def remove(root: Path) -> None:
    (root / "x_val_000000.npy").unlink()


def add(root: Path) -> None:
    write_shard(root / "x_train_000002.npy", TOKENS)


def shorten(root: Path) -> None:
    write_shard(root / "x_train_000001.npy", TOKENS[:4])


def truncate(root: Path) -> None:
    os.truncate(root / "x_train_000001.npy", 130)


def unfinish(root: Path) -> None:
    manifest = read_manifest(root)
    assert manifest is not None
    write_manifest(root, dataclasses.replace(manifest, resume={"cursor": None}))


def name_outside(root: Path) -> None:
    """A whole shard beside the folder, listed by the manifest."""
    (root / "x_val_000000.npy").rename(root.parent / "x_val_000000.npy")
    values = json.loads((root / "manifest.json").read_text())
    values["shards"][1]["file"] = "../x_val_000000.npy"
    (root / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove, "x_val_000000.npy is missing"),
        (add, "x_train_000002.npy is not in the manifest"),
        (shorten, "x_train_000001.npy has 4 tokens, not 5"),
        (truncate, "x_train_000001.npy is not a whole shard"),
        (unfinish, "only partly prepared: run the same `gpt2 prepare` again"),
        (name_outside, r"\.\./x_val_000000.npy is missing"),
    ],
)
def test_both_checks_name_what_is_wrong(prepared, damage, reason):
    damage(prepared)
    for check in (check_sizes, verify):
        with pytest.raises(ValueError, match=reason):
            check(prepared)


@settings(max_examples=30)
@given(at=st.integers(0, 10**6), difference=st.integers(1, 255))
def test_verify_finds_any_changed_byte_of_a_shard(tmp_path_factory, at, difference):
    root = tmp_path_factory.mktemp("changed")
    path = root / "x_train_000001.npy"
    entry = ShardEntry(path.name, len(TOKENS), write_shard(path, TOKENS))
    write_manifest(root, Manifest({}, "", {}, "", {}, (entry,), None))
    verify(root)
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= difference
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x_train_000001\.npy (has another sha256|is not a whole shard)"):
        verify(root)


def test_a_published_folder_without_a_manifest_passes_only_the_cheap_check(prepared):
    (prepared / "manifest.json").unlink()
    assert check_sizes(prepared) is None
    with pytest.raises(ValueError, match=r"has no manifest\.json to verify against"):
        verify(prepared)
    truncate(prepared)
    with pytest.raises(ValueError, match="is not a whole shard"):
        check_sizes(prepared)


def test_a_manifest_that_is_cut_anywhere_or_is_something_else_is_refused(prepared):
    path = prepared / "manifest.json"
    whole = path.read_bytes()
    cut = [whole[:length] for length in range(len(whole) - 1)]  # the last byte is a newline
    for content in (*cut, b"[]", b"{}", b"null", b'{"version": 1}', b'{"version": 99, "shards": []}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest\.json is not a manifest .*: delete .* and prepare it again"):
            read_manifest(prepared)
