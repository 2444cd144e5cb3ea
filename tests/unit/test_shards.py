"""Shards on disk: their bytes, what is refused, windows across borders, and what the manifest guards."""

import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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

TOKENS = np.array([50256, 0, 1, 258, 65535], dtype=np.uint16)


def test_npy_shard_has_the_bytes_of_np_save(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, TOKENS)
    write_shard(tmp_path / "x_train_000001.npy", TOKENS)
    assert (tmp_path / "x_train_000001.npy").read_bytes() == buffer.getvalue()


def test_bin_shard_has_llmc_s_bytes(tmp_path: Path) -> None:
    write_shard(tmp_path / "x_train_000001.bin", TOKENS)
    header = bytes.fromhex("88d83401" + "01000000" + "05000000") + bytes(253 * 4)  # 20240520, 1, 5 tokens
    assert (tmp_path / "x_train_000001.bin").read_bytes() == header + bytes.fromhex("50c4000001000201ffff")


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_written_shard_reads_back_memory_mapped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x_val_000000{suffix}"
    write_shard(path, TOKENS)
    tokens = open_shard(path)
    assert isinstance(tokens, np.memmap)
    assert (tokens.dtype, tokens.tolist()) == (np.dtype("<u2"), [50256, 0, 1, 258, 65535])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_write_that_fails_leaves_the_old_shard_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x_val_000000.npy"
    write_shard(path, TOKENS)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(path, TOKENS[:2])
    assert open_shard(path).tolist() == TOKENS.tolist()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def _bin(magic: int = 20240520, version: int = 1, count: int = 5, tokens: np.ndarray = TOKENS) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes() + tokens.tobytes()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.npy", _npy(TOKENS)[:-1], r"its header promises 5 tokens \(138 bytes\), but it has 137 bytes"),
        ("a.npy", _npy(TOKENS)[:40], "not a whole shard"),
        ("a.npy", _npy(TOKENS) + b"\0\0", "but it has 140 bytes"),
        ("a.npy", _npy(TOKENS.astype(np.float32)), "its tokens are float32, not little-endian uint16"),
        ("a.npy", _npy(TOKENS.astype(">u2")), "its tokens are >u2, not"),
        ("a.npy", _npy(np.array([{}], dtype=object)), "its tokens are object, not"),
        ("a.npy", _npy(TOKENS.reshape(1, 5)), "its array has 2 dimensions, not 1"),
        ("a.npy", _npy(TOKENS[:0]), "it holds no tokens"),
        ("a.npy", b"", "not a whole shard"),
        ("a.npy", b"PK\x03\x04 something else entirely", "not a whole shard"),
        ("a.bin", _bin(magic=20240801), "its magic number is 20240801, not 20240520"),
        ("a.bin", _bin(version=7), "its version is 7, not 1"),
        ("a.bin", _bin(count=6), r"its header promises 6 tokens \(1036 bytes\), but it has 1034 bytes"),
        ("a.bin", _bin(count=-1), "not a whole shard"),
        ("a.bin", _bin()[:1000], "it ends inside its header"),
    ],
)
def test_a_damaged_or_foreign_shard_is_named_with_its_reason(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        open_shard(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.npy is not a whole shard: No such file"):
        open_shard(tmp_path / "gone.npy")


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).touch()


def test_names_tell_the_split_and_nothing_else_is_listed(tmp_path: Path) -> None:
    _touch(tmp_path, "e_val_000000.npy", "e_train_000002.npy", "e_train_000001.npy", "notes.npy", "train.txt")
    _touch(tmp_path, ".e_train_000003.npy.tmp", "manifest.json")
    assert [path.name for path in list_shards(tmp_path, "train")] == ["e_train_000001.npy", "e_train_000002.npy"]
    assert [path.name for path in list_shards(tmp_path, "val")] == ["e_val_000000.npy"]


def test_the_last_word_of_a_name_tells_the_split(tmp_path: Path) -> None:
    _touch(tmp_path, "medieval_train_000001.bin", "train_val_000000.bin", "tiny_shakespeare_val.bin")
    assert [path.name for path in list_shards(tmp_path, "train")] == ["medieval_train_000001.bin"]
    assert [path.name for path in list_shards(tmp_path, "val")] == ["tiny_shakespeare_val.bin", "train_val_000000.bin"]


def test_mixed_missing_and_splitless_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere: make it with `gpt2 prepare"):
        list_shards(tmp_path / "nowhere", "train")
    _touch(tmp_path, "e_train_000001.npy")
    with pytest.raises(ValueError, match="holds no val shard"):
        list_shards(tmp_path, "val")
    _touch(tmp_path, "e_val_000000.bin")
    with pytest.raises(ValueError, match=r"mixes \.npy and \.bin"):
        list_shards(tmp_path, "train")


def _stream(root: Path, lengths: list[int], suffix: str = ".npy") -> TokenStream:
    """Shards that together hold 0, 1, 2 …"""
    ends = np.cumsum(lengths)
    paths = [root / f"x_train_{number:06d}{suffix}" for number in range(len(lengths))]
    for path, end, length in zip(paths, ends, lengths, strict=True):
        write_shard(path, np.arange(end - length, end, dtype=np.uint16))
    return TokenStream(paths)


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_windows_run_across_the_borders_of_shards(tmp_path: Path, suffix: str) -> None:
    stream = _stream(tmp_path, [5, 1, 2, 10], suffix)
    assert (len(stream), stream.lengths) == (18, (5, 1, 2, 10))
    windows = stream.read(np.array([0, 3, 4, 10]), 6)
    assert windows.dtype == np.uint16
    assert windows.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [3, 4, 5, 6, 7, 8],
        [4, 5, 6, 7, 8, 9],
        [10, 11, 12, 13, 14, 15],
    ]


@given(st.data())
def test_every_window_is_that_part_of_the_concatenation(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    stream = _stream(tmp_path_factory.mktemp("stream"), lengths)
    length = data.draw(st.integers(1, len(stream)))
    starts = data.draw(st.lists(st.integers(0, len(stream) - length), max_size=5))
    expected = [list(range(start, start + length)) for start in starts]
    assert stream.read(np.array(starts, dtype=np.int64), length).tolist() == expected


def test_a_window_beyond_the_stream_is_never_cut_short(tmp_path: Path) -> None:
    stream = _stream(tmp_path, [5, 5])
    for start in (-1, 6):
        with pytest.raises(AssertionError, match="outside"):
            stream.read(np.array([start]), 5)


def _first_tokens(stream: TokenStream) -> list[int]:
    return stream.read(np.array([3, 0]), 4)[:, 0].tolist()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_stream_in_use_goes_to_worker_processes(tmp_path: Path, method: str) -> None:
    if method == "fork" and sys.platform == "win32":
        pytest.skip("Windows has no fork")
    stream = _stream(tmp_path, [5, 5])
    assert _first_tokens(stream) == [3, 0]
    assert len(pickle.dumps(stream)) < 2000  # paths and lengths, no tokens
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert pool.submit(_first_tokens, stream).result() == [3, 0]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_a_hundred_shards_hold_few_file_descriptors(tmp_path: Path) -> None:
    def maps() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    files = len(os.listdir("/proc/self/fd"))
    stream = _stream(tmp_path, [3] * 100)
    assert (len(os.listdir("/proc/self/fd")) - files, maps()) == (0, 0)
    assert stream.read(np.arange(295), 4)[:, 3].tolist() == list(range(3, 298))
    assert 0 < maps() <= MAX_OPEN_SHARDS
    assert 0 < len(os.listdir("/proc/self/fd")) - files <= MAX_OPEN_SHARDS


# -- manifest ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A folder of one val and one train shard with a complete manifest."""
    entries = []
    for name, tokens in (("x_train_000001.npy", TOKENS), ("x_val_000000.npy", TOKENS[:2])):
        entries.append(ShardEntry(name, len(tokens), write_shard(tmp_path / name, tokens)))
    write_manifest(tmp_path, Manifest({"source": "x"}, "abc", {}, "in words", {"kept": 1}, tuple(entries), None))
    return tmp_path


def test_manifest_reads_back_and_counts_tokens(prepared: Path) -> None:
    manifest = verify(prepared)
    assert (manifest.complete, manifest.tokens("train"), manifest.tokens("val")) == (True, 5, 2)
    assert manifest.source == {"source": "x"}
    assert read_manifest(prepared) == manifest


def _damage_token(root: Path) -> None:
    path = root / "x_train_000001.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _remove(root: Path) -> None:
    (root / "x_val_000000.npy").unlink()


def _add(root: Path) -> None:
    write_shard(root / "x_train_000002.npy", TOKENS)


def _shorten(root: Path) -> None:
    write_shard(root / "x_train_000001.npy", TOKENS[:4])


def _truncate(root: Path) -> None:
    os.truncate(root / "x_train_000001.npy", 130)


def _unfinish(root: Path) -> None:
    manifest = read_manifest(root)
    assert manifest is not None
    write_manifest(root, dataclasses.replace(manifest, resume={"skip": 0}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_remove, "x_val_000000.npy is missing"),
        (_add, "x_train_000002.npy is not in the manifest"),
        (_shorten, "x_train_000001.npy has 4 tokens, not 5"),
        (_truncate, "its header promises 5 tokens"),
        (_unfinish, "only partly prepared: run the same `gpt2 prepare` again"),
    ],
)
def test_the_cheap_check_names_what_is_wrong(prepared: Path, damage: Callable[[Path], None], reason: str) -> None:
    check_sizes(prepared)
    damage(prepared)
    for check in (check_sizes, verify):
        with pytest.raises(ValueError, match=reason):
            check(prepared)


def test_verify_sees_a_single_changed_bit_that_sizes_do_not(prepared: Path) -> None:
    _damage_token(prepared)
    check_sizes(prepared)
    with pytest.raises(ValueError, match=r"x_train_000001\.npy has another sha256"):
        verify(prepared)


def test_a_published_folder_without_manifest_passes_the_cheap_check_only(prepared: Path) -> None:
    (prepared / "manifest.json").unlink()
    check_sizes(prepared)
    assert read_manifest(prepared) is None
    with pytest.raises(ValueError, match=r"has no manifest\.json to verify against"):
        verify(prepared)
    _truncate(prepared)
    with pytest.raises(ValueError, match="its header promises 5 tokens"):
        check_sizes(prepared)


@pytest.mark.parametrize(
    "name",
    ["../x_train_000001.npy", "/etc/x_train_000001.npy", "..\\x_train_000001.npy", "C:x_train_1.npy", "notes.txt"],
)
def test_no_name_in_a_manifest_leads_out_of_its_folder(prepared: Path, name: str) -> None:
    path = prepared / "manifest.json"
    values = json.loads(path.read_text())
    values["shards"][0]["file"] = name
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(f"{name!r} is not a shard's name")):
        verify(prepared)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1}', '{"version": 99, "shards": []}', "\udcff"])
def test_a_manifest_that_makes_no_sense_is_refused_in_one_sentence(prepared: Path, content: str) -> None:
    (prepared / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read \(.*\): prepare into another folder") as error:
        read_manifest(prepared)
    assert "\n" not in str(error.value)
