"""Bytes that nobody meant: shards, manifests and HellaSwag files open to what was written, or one sentence refuses."""

import hashlib
import io
import json
import os
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils.data import DataLoader

from gpt2_lightning.checkpoints.load import load
from gpt2_lightning.data.datamodule import SequenceDataset
from gpt2_lightning.data.order import EvalBatchSampler, StepBatchSampler, sequences_per_shard
from gpt2_lightning.data.prepare.write import ensure_prepared, prepare
from gpt2_lightning.data.shards import (
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
from gpt2_lightning.evals.hellaswag import Example, Examples, load_examples, score_rows
from gpt2_lightning.model import GPT, GPTConfig
from gpt2_lightning.tokenizer import get_tokenizer

T = TypeVar("T")
LINKS = pytest.mark.skipif(os.name != "posix", reason="links and pipes are POSIX")
SUFFIXES = [".npy", ".bin"]
TOKENS = np.array([50256, 0, 1, 258, 65535, 12336, 8224, 10794, 2573], dtype="<u2")


def fuzz(examples: int) -> settings:
    """The same examples each time, none of them timed: this machine may be busy."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing guards against power cuts, which no test brings about."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def unless_refused(call: Callable[[], T], name: object) -> T | None:
    """What ``call`` gives, or None where it refuses in one sentence that names the file or folder."""
    try:
        return call()
    except ValueError as error:
        said = str(error)
        assert str(name) in said
        assert "\n" not in said
        assert len(said) < 2000
        return None


# -- shards ------------------------------------------------------------------------------------------------------------


def shard_bytes(suffix: str, tokens: np.ndarray = TOKENS) -> bytes:
    """As numpy and llm.c write them."""
    if suffix == ".bin":
        return struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + tokens.tobytes()
    buffer = io.BytesIO()
    np.save(buffer, tokens)
    return buffer.getvalue()


def opened(path: Path, content: bytes) -> list[int] | None:
    """The tokens of a file with this content, None where it is refused; what opens is what the file ends in."""
    path.write_bytes(content)
    tokens = unless_refused(lambda: open_shard(path), path)
    if tokens is None:
        return None
    assert (tokens.dtype, tokens.ndim) == (np.dtype("<u2"), 1)
    assert 0 < tokens.nbytes < len(content)
    assert tokens.tobytes() == content[-tokens.nbytes :]
    return tokens.tolist()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_changed_byte_of_a_header_changes_no_token(folder: Path, suffix: str) -> None:
    whole, path = shard_bytes(suffix), folder / f"a{suffix}"
    header = len(whole) - TOKENS.nbytes
    decides = {".npy": 11, ".bin": 12}[suffix]  # magic, version, length or count: no other value means the same
    says = {".npy": 72, ".bin": 12}[suffix]  # what follows fills it up
    for at in range(header):
        for byte in {*(whole[at] ^ 1 << bit for bit in range(8)), *b"\n#0"} if at < says else {255}:
            found = opened(path, whole[:at] + bytes([byte]) + whole[at + 1 :])
            assert byte == whole[at] or found in ([None] if at < decides else [None, TOKENS.tolist()])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_shard_that_is_cut_or_goes_on_is_opened(folder: Path, suffix: str) -> None:
    whole, path = shard_bytes(suffix), folder / f"b{suffix}"
    for length in range(len(whole)):
        assert opened(path, whole[:length]) is None
    for appended in (b"\0", b"\0\0", b"\n", whole, TOKENS.tobytes()):
        assert opened(path, whole + appended) is None
    assert opened(path, whole) == TOKENS.tolist()


@fuzz(60)
@given(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), st.data())
def test_only_rows_of_uint16_are_tokens(folder: Path, shape: tuple[int, ...], data: st.DataObject) -> None:
    kinds = hnp.scalar_dtypes() | hnp.array_dtypes() | st.sampled_from(["O", "<u2", ">u2", "<i2", "V2", "S2", "U0"])
    kind = np.dtype(data.draw(kinds))
    order = data.draw(st.sampled_from("CF"))
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, kind, order=order), allow_pickle=True)
    found = opened(folder / "c.npy", buffer.getvalue())
    assert (found is not None) == (kind == np.dtype("<u2") and len(shape) == 1 and shape[0] > 0)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_each_version_of_npy_opens_and_no_other(folder: Path, version: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, TOKENS, version=version, allow_pickle=False)
    whole = buffer.getvalue()
    assert opened(folder / "d.npy", whole) == TOKENS.tolist()
    for major, minor in ((0, 0), (version[0], 1), (4, 0), (255, 255)):
        assert opened(folder / "d.npy", whole[:6] + bytes([major, minor]) + whole[8:]) is None


DESCRIPTIONS = [
    "'<u2'", "'>u2'", "'|O'", "b'<u2'", "'u2'", "('<u2', (2,))", "('<u2',)", "()", "[]", "[('a', '<u2')]", "[[]]",
    "None", "'<u2,<u2'", "'\\x00'", "'\\ud800'", "1e999", "{}", "'<u2' * 9",
    "'V9999999999'", "('<u2', -1)", "[('', '|V2')]",
]  # fmt: skip
SHAPES = [
    "(9,)", "(-9,)", "(0,)", "(9L,)", "(True,)", "(4611686018427387904,)", f"(0x{'f' * 5000},)", f"(1{'0' * 5000},)",
    "(9.0,)", "9", "[9]", "()", "(9, 1)", "((9,),)", "(2**62,)", "(9,", "-" * 9000 + "9", "(" * 500, "'" * 7, "(9,)\n",
]  # fmt: skip


@fuzz(250)
@given(
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]) | st.tuples(st.integers(0, 255), st.integers(0, 255)),
    description=st.sampled_from(DESCRIPTIONS),
    order=st.sampled_from(["False", "True", "0", "None"]),
    shape=st.sampled_from(SHAPES),
    more=st.sampled_from(["", "", "", "'x': 1", "b'x': 1", "'shape': (1,)", "1", "**{}", "\0", "\xe9"]),
    length=st.none() | st.sampled_from([0, 1, 118, 65535, 2**31, 2**32 - 1]),
    payload=st.sampled_from([TOKENS.tobytes(), b"", b"\0", TOKENS.tobytes() * 2000]),
)
def test_a_header_that_lies_opens_nothing_that_is_not_there(
    folder: Path,
    version: tuple[int, int],
    description: str,
    order: str,
    shape: str,
    more: str,
    length: int | None,
    payload: bytes,
) -> None:
    text = f"{{'descr': {description}, 'fortran_order': {order}, 'shape': {shape}, {more}}}\n".encode("latin1")
    size = len(text) if length is None else length
    count = struct.pack("<H", size % 2**16) if version[0] == 1 else struct.pack("<I", size)
    opened(folder / "e.npy", b"\x93NUMPY" + bytes(version) + count + text + payload)


@pytest.mark.parametrize(
    "content",
    [
        b"\x93NUMPY\x02\0\xff\xff\xff\xff" + bytes(100),
        b"\x93NUMPY\x03\0\xff\xff\xff\x7f{" + b" " * 100_000,
        b"\x93NUMPY\x01\0\x60\xea" + b"-" * 60_000,
        b"\x93NUMPY\x01\0\x4f\0{'descr': '<u2', 'fortran_order': False, 'shape': (9223372036854775807,)}" + b"   \n",
        struct.pack("<256i", 20240520, 1, 2**31 - 1, *[0] * 253) + TOKENS.tobytes(),
        struct.pack("<256i", 20240520, 1, -(2**31), *[0] * 253) + TOKENS.tobytes(),
    ],
    ids=["npy 2", "npy 3", "npy 1", "shape", "most", "least"],
)
def test_no_memory_is_asked_for_on_the_word_of_a_header(folder: Path, content: bytes) -> None:
    for suffix in SUFFIXES:
        path = folder / f"f{suffix}"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            assert unless_refused(lambda path=path: open_shard(path), path) is None
            assert tracemalloc.get_traced_memory()[1] < 4_000_000
        finally:
            tracemalloc.stop()


@fuzz(200)
@given(
    st.sampled_from(SUFFIXES), st.sampled_from([b"", b"\x93NUMPY\1\0\x76\0", b"\x88\xd84\1"]), st.binary(max_size=1200)
)
def test_any_bytes_at_all(folder: Path, suffix: str, magic: bytes, content: bytes) -> None:
    opened(folder / f"g{suffix}", magic + content)


@LINKS
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "x_val_000000.npy").mkdir()
    (tmp_path / "x_train_000001.npy").symlink_to("gone.npy")
    os.mkfifo(tmp_path / "x_train_000002.npy")  # who opens it for reading waits for a writer
    for path in tmp_path.iterdir():
        assert unless_refused(lambda path=path: open_shard(path), path) is None
    assert unless_refused(lambda: check_sizes(tmp_path), tmp_path) is None


@fuzz(40)
@given(hnp.arrays(np.uint16, st.integers(1, 90)), st.integers(1, 80), st.sampled_from(SUFFIXES))
def test_what_is_written_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, tokens: np.ndarray, size: int, suffix: str
) -> None:
    root = tmp_path_factory.mktemp("shards")
    pieces = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    for number, piece in enumerate(pieces):
        path = root / f"x_train_{number:06d}{suffix}"
        assert write_shard(path, piece) == hashlib.sha256(shard_bytes(suffix, piece)).hexdigest()
        assert path.read_bytes() == shard_bytes(suffix, piece)
        assert open_shard(path).tolist() == piece.tolist()
    stream = TokenStream(list_shards(root, "train"))
    assert stream.lengths == tuple(map(len, pieces))
    assert stream.read(np.array([0]), len(tokens))[0].tolist() == tokens.tolist()


@fuzz(60)
@given(st.integers(2, 65535), st.data())
def test_an_id_beyond_the_vocabulary_is_noticed_at_the_start(
    folder: Path, vocab_size: int, data: st.DataObject
) -> None:
    tokens = data.draw(hnp.arrays(np.uint16, st.integers(5, 60), elements=st.integers(0, vocab_size - 1)))
    path = folder / "h.npy"
    path.write_bytes(shard_bytes(".npy", tokens))
    assert len(SequenceDataset([path], 4, vocab_size, "sequential", 0)) == (len(tokens) - 1) // 4
    highest = data.draw(st.integers(vocab_size, 65535))
    tokens[data.draw(st.integers(0, len(tokens) - 1))] = highest
    path.write_bytes(shard_bytes(".npy", tokens))
    with pytest.raises(ValueError, match=rf"token id {highest} in {re.escape(str(path))} is not below .*={vocab_size}"):
        SequenceDataset([path], 4, vocab_size, "sequential", 0)


# -- manifests ---------------------------------------------------------------------------------------------------------

WRITTEN = {"x_val_000000.npy": TOKENS[:3], "x_train_000001.npy": TOKENS, "x_train_000002.npy": TOKENS[::-1].copy()}


def write_folder(root: Path) -> bytes:
    """Three shards and their manifest, whose content it gives."""
    entries = [ShardEntry(name, len(tokens), write_shard(root / name, tokens)) for name, tokens in WRITTEN.items()]
    documents = {"kept": 3, "null": 0, "empty": 0, "replaced": 0}
    write_manifest(root, Manifest({"source": "x"}, "abc", {"name": None}, "words", documents, tuple(entries), None))
    return (root / "manifest.json").read_bytes()


def stands(root: Path) -> bool:
    """Whether the folder is vouched for; then it holds what was written, else each way to open it says so."""
    manifest = unless_refused(lambda: verify(root), root)
    unless_refused(lambda: read_manifest(root), root)
    unless_refused(lambda: check_sizes(root), root)
    if manifest is None:
        return False
    assert {shard.file: shard.tokens for shard in manifest.shards} == {name: len(t) for name, t in WRITTEN.items()}
    for split, count in (("train", 18), ("val", 3)):
        stream = TokenStream(list_shards(root, split))
        expected = np.concatenate([tokens for name, tokens in WRITTEN.items() if split in name]).tolist()
        assert manifest.tokens(split) == len(stream) == count
        assert stream.read(np.array([0]), count)[0].tolist() == expected
    return True


@pytest.fixture(scope="module")
def vouched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    root = tmp_path_factory.mktemp("vouched")
    return root, write_folder(root)


def with_manifest(vouched: tuple[Path, bytes], content: bytes) -> bool:
    (vouched[0] / "manifest.json").write_bytes(content)
    return stands(vouched[0])


def test_a_manifest_that_is_cut_anywhere_is_refused(vouched: tuple[Path, bytes]) -> None:
    content = vouched[1]
    assert with_manifest(vouched, content)
    assert [n for n in range(len(content)) if with_manifest(vouched, content[:n])] == [len(content) - 1]  # a line's end


@fuzz(300)
@given(st.data())
def test_a_manifest_with_other_bytes_vouches_for_nothing_else(vouched: tuple[Path, bytes], data: st.DataObject) -> None:
    content = bytearray(vouched[1])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with_manifest(vouched, bytes(content))


KEYS = st.text(max_size=5) | st.just("a\nb")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**63, 10**40, -(10**400), float("nan"), float("inf"), 9.0, "9", "\ud800", "", "../x"])
    | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in a JSON value: what holds it, and its key or index there."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def damaged(data: st.DataObject, values: Any, new: st.SearchStrategy[Any] = JSON) -> None:
    """Puts something else into one place of a JSON value, takes it away, or adds another beside it."""
    holder, key = data.draw(st.sampled_from(list(places(values))))
    how = data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if how == "replace":
        holder[key] = data.draw(new)
    elif how == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, data.draw(new | st.just(holder[key])))
    else:
        holder[data.draw(KEYS)] = data.draw(new)


@fuzz(250)
@given(st.data())
def test_a_manifest_with_another_value_vouches_for_nothing_else(
    vouched: tuple[Path, bytes], data: st.DataObject
) -> None:
    values = json.loads(vouched[1])
    damaged(data, values)
    with_manifest(vouched, json.dumps(values).encode())


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 50, b"[" * 100_000, b'{"a":' * 100_000, b"null", b"1" * 10_000, b"1e999", b'"version"',
        b"\xff\xfe{}", b'{"version": 1, "shards": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
    ids=lambda content: ascii(content[:9]),
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(vouched: tuple[Path, bytes], content: bytes) -> None:
    assert not with_manifest(vouched, content)
    assert unless_refused(lambda: read_manifest(vouched[0]), vouched[0] / "manifest.json") is None


@LINKS
def test_shards_are_listed_once_with_their_own_hash_and_within_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    content = write_folder(root)
    write_shard(tmp_path / "x_train_000001.npy", TOKENS)  # what the names below lead to is whole
    link = root / "linked"
    link.symlink_to(tmp_path)

    def with_first(**changes: Any) -> bool:
        values = json.loads(content)
        values["shards"][1] |= changes
        (root / "manifest.json").write_text(json.dumps(values))
        return stands(root)

    assert with_first()
    first = "x_train_000001.npy"
    for name in (
        f"../{first}", str(tmp_path / first), f"linked/{first}", f"./{first}", f"..\\{first}", f"C:{first}",
        f".{first}", f"{first}\0", f"{first}\n", "x_train_000002.npy", "x_train_000003.npy", "notes.txt", "", None, 1,
    ):  # fmt: skip
        assert not with_first(file=name)
    for tokens in (0, -9, 8, 10, 2**63, 10**40, 9.0, "9", True, None, [9]):
        assert not with_first(tokens=tokens)
    for sha256 in ("", "0" * 64, hashlib.sha256(TOKENS[:3].tobytes()).hexdigest(), None, 0):
        assert not with_first(sha256=sha256)
    values = json.loads(content)
    (root / "manifest.json").write_text(json.dumps(values | {"shards": values["shards"] + values["shards"][:1]}))
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read \(it lists a shard twice\)"):
        verify(root)


@LINKS
def test_a_link_out_of_the_folder_is_as_good_as_what_it_leads_to(tmp_path: Path) -> None:
    """Hub caches keep files as links, so links are followed; that nothing else comes in by them, the hashes see to."""
    root = tmp_path / "data"
    root.mkdir()
    write_folder(root)
    shard = root / "x_train_000001.npy"
    shard.rename(tmp_path / "elsewhere.npy")
    shard.symlink_to(tmp_path / "elsewhere.npy")
    assert stands(root)
    write_shard(tmp_path / "elsewhere.npy", TOKENS + 1)
    assert not stands(root)
    shard.unlink()
    shard.symlink_to("/dev/zero")
    assert not stands(root)


@fuzz(60)
@given(st.sampled_from(sorted(WRITTEN)), st.integers(0, 10**6), st.integers(1, 255))
def test_verify_notices_any_other_byte_of_any_shard(
    vouched: tuple[Path, bytes], name: str, at: int, difference: int
) -> None:
    root, content = vouched
    (root / "manifest.json").write_bytes(content)
    path = root / name
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[at % len(whole)] ^= difference
    path.write_bytes(changed)
    try:
        assert unless_refused(lambda: verify(root), name) is None
    finally:
        path.write_bytes(whole)


TEXTS = ["One.", "Two two.", "Three three three.", "Four " * 4, "Five " * 9]
ASKED = [token for text in TEXTS[1:] for token in [50256, *get_tokenizer().encode_ordinary(text)]]


@pytest.fixture(scope="module")
def corpus(folder: Path) -> str:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def trained_on(root: Path) -> list[int]:
    stream = TokenStream(list_shards(root, "train"))
    return stream.read(np.array([0]), len(stream))[0].tolist()


@fuzz(12)
@given(st.integers(1, 40), st.sampled_from(["npy", "bin"]))
def test_shards_of_any_size_hold_the_documents(
    tmp_path_factory: pytest.TempPathFactory, corpus: str, size: int, form: Any
) -> None:
    root = tmp_path_factory.mktemp("prepared")
    prepare(corpus, root, shard_tokens=size, format=form, workers=1, progress=False)
    verify(root)
    assert trained_on(root) == ASKED
    assert {len(open_shard(path)) for path in list_shards(root, "train")[:-1]} <= {size}


@pytest.fixture(scope="module")
def half_prepared(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> dict[str, bytes]:
    """The files of a preparation that was cut after its second shard, by their names."""
    from gpt2_lightning.data.prepare import write as module

    class Cut(BaseException):
        pass

    root, calls = tmp_path_factory.mktemp("half"), 0

    def write(root: Path, manifest: Manifest) -> None:
        nonlocal calls
        calls += 1
        write_manifest(root, manifest)
        if calls == 3:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_manifest", write)
        with pytest.raises(Cut):
            prepare(corpus, root, shard_tokens=12, workers=1, progress=False)
    return {path.name: path.read_bytes() for path in root.iterdir()}


@fuzz(80)
@given(st.data(), st.booleans())
def test_a_preparation_goes_on_from_a_manifest_that_makes_sense_or_refuses(
    folder: Path, corpus: str, half_prepared: dict[str, bytes], data: st.DataObject, fit: bool
) -> None:
    root = folder / "again"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in half_prepared.items():
        (root / name).write_bytes(content)
    values = json.loads(half_prepared["manifest.json"])
    # a whole number in another's place is a place to go on from: nothing tells that it is the wrong one
    damaged(data, values, JSON.filter(lambda value: type(value) is not int or value < 0))
    assume(values.get("resume") is not None)  # as if it had been complete, and shorter
    (root / "manifest.json").write_text(json.dumps(values))

    def go_on() -> bool:
        if fit:
            ensure_prepared(corpus, root)
        else:
            prepare(corpus, root, shard_tokens=12, workers=1, progress=False)
        return True

    if unless_refused(go_on, root):
        verify(root)
        assert trained_on(root) == ASKED


# -- weights -----------------------------------------------------------------------------------------------------------

SHAPE = {"block_size": 6, "vocab_size": 11, "n_layer": 2, "n_head": 1, "n_embd": 4}
SMALL = GPT(GPTConfig(**SHAPE))


@fuzz(80)
@given(st.data())
def test_weights_open_in_their_own_shape_alone(folder: Path, data: st.DataObject) -> None:
    """Above all no network is built on the word of a number: one of 10⁹ layers would take days to refuse."""
    numbers = st.integers(-1, 12) | st.sampled_from([10**9, 2**31, 2**62, 2**63, 10**30, 0.5, float("inf"), "4", None])
    shape: dict[str, Any] = SHAPE | {data.draw(st.sampled_from(sorted(SHAPE))): data.draw(numbers)}
    state: dict[Any, Any] = {f"model.{name}": tensor for name, tensor in SMALL.state_dict().items()}
    if data.draw(st.booleans()):
        state |= {
            data.draw(st.sampled_from([*state, 7, "x"])): data.draw(st.sampled_from([None, 3, "x", torch.ones(2)]))
        }
    path = folder / "a.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {"config": shape}}, path)
    model = unless_refused(lambda: load(path), "")
    if model is not None:
        assert (model.config.n_layer, model.config.n_embd) == (2, 4)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), SMALL.parameters(), strict=True))


# -- HellaSwag ---------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
ROW = st.fixed_dictionaries(
    {
        "ctx": TEXT.filter(bool),
        "endings": st.lists(TEXT, min_size=4, max_size=4),
        "label": st.integers(0, 3) | st.sampled_from("0123"),
    },
    optional={name: st.none() | TEXT for name in ("ctx_a", "ctx_b", "activity_label")} | {"ind": JSON},
)


def is_row(record: Any) -> bool:
    """Whether HellaSwag has such a row."""
    if not isinstance(record, dict) or not {"ctx", "endings", "label"} <= record.keys():
        return False
    endings, optional = record["endings"], [record.get(name) for name in ("ctx_a", "ctx_b", "activity_label")]
    if not isinstance(endings, list) or len(endings) != 4:
        return False
    texts = [record["ctx"], *endings, *(text for text in optional if text is not None)]
    if not all(isinstance(text, str) and not re.search("[\ud800-\udfff]", text) for text in texts):
        return False
    label = record["label"]
    return record["ctx"] != "" and (label in ("0", "1", "2", "3") or (type(label) is int and 0 <= label <= 3))


def as_row(record: dict[str, Any]) -> Example:
    optional = {name: record.get(name) for name in ("activity_label", "ctx_a", "ctx_b")}
    return Example(record["ctx"], tuple(record["endings"]), int(record["label"]), **optional)


def read_rows(path: Path, content: bytes) -> tuple[Example, ...] | None:
    path.write_bytes(content)
    examples = unless_refused(lambda: load_examples(path), path)
    return examples and examples.rows


@fuzz(150)
@given(
    st.lists(ROW, min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_rows_come_in_as_they_were_written(
    folder: Path, records: list[dict[str, Any]], end: str, ascii_only: bool, mark: bool, ended: bool
) -> None:
    records = [*records, records[0]]  # a row that comes twice counts twice
    if not ascii_only:  # the field that is not read may hold what UTF-8 cannot
        records = [record | {"ind": 0} for record in records]
    text = end.join(json.dumps(record, ensure_ascii=ascii_only) for record in records) + end * ended
    content = text.encode("utf-8-sig" if mark else "utf-8")
    assert read_rows(folder / "rows.jsonl", content) == tuple(map(as_row, records))


@fuzz(200)
@given(st.lists(ROW, min_size=2, max_size=3), st.data())
def test_a_row_that_is_none_is_named_with_its_line(
    folder: Path, records: list[dict[str, Any]], data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(records) - 1))
    holder = {"row": records[number]}
    damaged(data, holder)
    records[number] = holder.get("row")
    path = folder / "damaged.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    if is_row(records[number]):
        assert load_examples(path).rows == tuple(map(as_row, records))
    else:
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line {number + 1}[: ]") as error:
            load_examples(path)
        assert "\n" not in str(error.value)


def test_a_line_that_is_no_json_is_named(folder: Path) -> None:
    whole = b'{"ctx": "a", "endings": ["a", "b", "c", "d"], "label": 1}'
    lines = [
        b"\xff", b"\xc3", "\ufeff".encode("utf-16"), b"\xef\xbb\xbf{}", b"\0", b"{", b"{}", b"nan", b"NaN", b"1" * 5000,
        b"[" * 100_000, b'{"ctx":' * 100_000, whole * 2, whole[:-2] + b"1" * 5000 + b"}",
        *(whole[:-2] + b"[" * n + b"]" * n + b"}" for n in range(800, 1000)),  # as deep as this process can just read
    ]  # fmt: skip
    path = folder / "lines.jsonl"
    for line in lines:
        path.write_bytes(whole + b"\n\n" + line + b"\n" + whole)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 3[: ]") as error:
            load_examples(path)
        assert len(str(error.value)) < 400


@fuzz(4)
@given(st.lists(ROW, min_size=2, max_size=2), st.booleans())
def test_a_last_line_that_is_cut_is_no_row(folder: Path, records: list[dict[str, Any]], ascii_only: bool) -> None:
    first, last = (json.dumps(record | {"ind": 0}, ensure_ascii=ascii_only).encode() for record in records)
    path = folder / "cut.jsonl"
    for length in range(len(last)):
        rows = read_rows(path, first + b"\n" + last[:length])
        assert rows == (None if length else (as_row(records[0]),))


@fuzz(200)
@given(st.binary(max_size=200), st.lists(ROW, min_size=1, max_size=2), st.data())
def test_any_bytes_give_rows_or_a_sentence(
    folder: Path, content: bytes, records: list[dict[str, Any]], data: st.DataObject
) -> None:
    path = folder / "bytes.jsonl"
    read_rows(path, content)
    changed = bytearray("\n".join(map(json.dumps, records)).encode())
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    rows = read_rows(path, bytes(changed))
    assert rows is None or len(rows) in (len(records) - 1, len(records), len(records) + 1)


MODEL = GPT(GPTConfig(block_size=64, vocab_size=50257, n_layer=1, n_head=1, n_embd=4))
LONG = [
    "a" * 20_000,
    " " * 20_000,
    "[" * 3_000,
    "word " * 5_000,
    "🙂" * 3_000,
    "\0",
    "<|endoftext|>" * 500,
    "\t\n" * 99,
]


@fuzz(10)
@example("x", [" ", "", "\t", "\u3000"], 0)
@given(st.sampled_from([*LONG, "x"]) | TEXT.filter(bool), st.lists(TEXT, min_size=4, max_size=4), st.integers(0, 3))
def test_every_row_that_is_read_can_be_scored(ctx: str, endings: list[str], label: int) -> None:
    row = Example(ctx, tuple(endings), label, activity_label=ctx, ctx_a=ctx, ctx_b=endings[0])
    for style in ("nanogpt", "harness"):
        (score,) = score_rows(MODEL, Examples((row,), "one"), style)
        assert np.isfinite(score.log_likelihoods).all()


@pytest.mark.parametrize("style", ["nanogpt", "harness"])
@pytest.mark.parametrize("text", LONG)
def test_an_ending_that_is_too_long_is_named_with_its_row(text: str, style: Any) -> None:
    row = Example("It", ("a", text, "c", "d"), 1, activity_label="It", ctx_a="It", ctx_b="")
    scores = unless_refused(lambda: score_rows(MODEL, Examples((row,), "one"), style), "row 1 has an ending of")
    assert (scores is None) == (len(text) > 64 and not (style == "harness" and text.isspace()))


# -- order -------------------------------------------------------------------------------------------------------------


def scattered(x: int) -> int:
    """splitmix64's finaliser on Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def permuted(i: int, n: int, key: int) -> int:
    """Where four Feistel rounds on the next power of four take ``i``, again and again until it falls below ``n``."""
    half = 1
    while 4**half < n:
        half += 1
    while True:
        left, right = divmod(i, 2**half)
        for turn in range(4):
            left, right = right, left ^ scattered(right + scattered((key + turn) % 2**64)) % 2**half
        i = left * 2**half + right
        if i < n:
            return i


def epoch_of(starts: list[list[int]], order: str, seed: int, epoch: int) -> list[int]:
    """The windows of an epoch, one after the other; ``starts`` are those of each shard."""
    if order == "sequential":
        return [window for shard in starts for window in shard]
    key = scattered((scattered(seed) + epoch) % 2**64)
    turns = [permuted(turn, len(starts), key) for turn in range(len(starts))]
    inside = {k: scattered((key + k) % 2**64) for k in turns}
    return [starts[k][permuted(i, len(starts[k]), inside[k])] for k in turns for i in range(len(starts[k]))]


def windows_by_shard(lengths: list[int], size: int) -> list[list[int]]:
    """Which windows begin in each shard, found token by token."""
    owner = [shard for shard, length in enumerate(lengths) for _ in range(length)]
    found: list[list[int]] = [[] for _ in lengths]
    for window in range(len(owner)):
        if (window + 1) * size < len(owner):  # its last target is there
            found[owner[window * size]].append(window)
    return found


@fuzz(150)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 12))
def test_windows_are_counted_where_they_begin(lengths: list[int], size: int) -> None:
    assert sequences_per_shard(lengths, size) == [len(windows) for windows in windows_by_shard(lengths, size)]


@st.composite
def runs(draw: Any) -> tuple[Any, ...]:
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) > 8))
    size = draw(st.integers(1, min(6, sum(lengths) - 1)))
    world, accumulate = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    micro_batch_sizes = sorted(
        draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    )  # of each step: a ramp, or not
    start = draw(st.integers(0, len(micro_batch_sizes) - 1))
    return lengths, size, world, accumulate, micro_batch_sizes, start, draw(st.sampled_from(["sequential", "shuffled"]))


def assert_tokens_of(
    root: Path, run: tuple[Any, ...], seed: int, read: Callable[[SequenceDataset, StepBatchSampler], list[Any]]
) -> None:
    lengths, size, world, accumulate, micro_batch_sizes, start, order = run
    tokens = np.random.default_rng(seed).integers(0, 1000, sum(lengths))
    paths = []
    for number, (end, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
        paths.append(root / f"x_train_{number:06d}.npy")
        paths[-1].write_bytes(shard_bytes(".npy", tokens[end - length : end].astype("<u2")))
    starts = windows_by_shard(lengths, size)

    # naively: one list of all windows in the order of the epochs, dealt out B at a time to one rank after the other
    wanted = sum(B * accumulate * world for B in micro_batch_sizes)
    windows: list[int] = []
    epoch = 0
    while len(windows) < wanted:
        windows += epoch_of(starts, order, seed, epoch)
        epoch += 1
    expected: dict[int, list[list[list[int]]]] = {rank: [] for rank in range(world)}
    for step, B in enumerate(micro_batch_sizes):
        for _ in range(accumulate):
            for rank in range(world):
                taken, windows = windows[:B], windows[B:]
                if step >= start:
                    expected[rank].append([tokens[w * size : w * size + size + 1].tolist() for w in taken])

    dataset = SequenceDataset(paths, size, 1000, order, seed)
    for rank in range(world):
        before = [accumulate * world * sum(micro_batch_sizes[:step]) for step in range(len(micro_batch_sizes) + 1)]
        sampler = StepBatchSampler(before.__getitem__, accumulate, len(micro_batch_sizes), start, rank, world)
        assert len(sampler) == accumulate * len(micro_batch_sizes)
        assert [batch.tolist() for batch in read(dataset, sampler)] == expected[rank]


@fuzz(60)
@given(runs(), st.integers(0, 2**62))
def test_each_rank_sees_what_naive_counting_gives_it(folder: Path, run: tuple[Any, ...], seed: int) -> None:
    assert_tokens_of(folder, run, seed, lambda dataset, sampler: [dataset.__getitems__(samples) for samples in sampler])


def _as_is(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize("workers", [1, 2])
@fuzz(4)
@given(runs(), st.integers(0, 2**62))
def test_workers_change_nothing_of_it(folder: Path, workers: int, run: tuple[Any, ...], seed: int) -> None:
    assert_tokens_of(
        folder,
        run,
        seed,
        lambda dataset, sampler: list(
            DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=_as_is)
        ),
    )


@fuzz(60)
@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 5))
def test_evaluation_deals_out_each_window_once(windows: int, batch: int, world: int) -> None:
    samplers = [EvalBatchSampler(windows, batch, rank, world) for rank in range(world)]
    dealt = [list(sampler) for sampler in samplers]
    assert list(map(len, samplers)) == list(map(len, dealt))
    in_turn = [dealt[i % world][i // world] for i in range(sum(map(len, dealt)))]
    assert [window for part in in_turn for window in part] == list(range(windows))
    assert all(len(part) == batch for part in in_turn[:-1])
