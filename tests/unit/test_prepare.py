"""Documents to shards: the tokens, the split, the same bytes after every interruption, and what is refused."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.data import shards
from gpt2_lightning.data.prepare import sources
from gpt2_lightning.data.prepare import write as prepare_module
from gpt2_lightning.data.prepare.encode import _LONG_RUN_END, encode
from gpt2_lightning.data.prepare.write import ensure_prepared, prepare
from gpt2_lightning.data.shards import Manifest, TokenStream, list_shards, read_manifest, verify
from gpt2_lightning.tokenizer import get_tokenizer

EOT = 50256


def _jsonl(path: Path, texts: list[Any]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing guards against power cuts, which no test brings about."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """250 documents, ≈ 15,000 tokens, of lengths that never fall on a shard's border together."""
    return _jsonl(tmp_path / "corpus.jsonl", [f"Document {i}. " + f"word{i} again, " * (i % 23) for i in range(250)])


def _texts(corpus: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(corpus).read_text().splitlines()]


def _reference(texts: list[str]) -> list[int]:
    """build-nanogpt's tokens: each document's list after <|endoftext|>."""
    return [token for text in texts for token in [EOT, *get_tokenizer().encode_ordinary(text)]]


def _tokens(root: Path, split: Any) -> list[int]:
    stream = TokenStream(list_shards(root, split))
    return stream.read(np.array([0]), len(stream))[0].tolist()


def _files(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def _make(source: str | list[str], out: Path, **options: Any) -> Manifest:
    return prepare(source, out, **{"shard_tokens": 1000, "workers": 2, "progress": False} | options)


# -- tokens and split --------------------------------------------------------------------------------------------------


def test_documents_begin_with_end_of_text_and_special_tokens_in_them_stay_text() -> None:
    assert encode("Hello world").tolist() == [50256, 15496, 995]
    assert encode("<|endoftext|>").tolist() == [50256, 27, 91, 437, 1659, 5239, 91, 29]
    assert encode("Hello world").dtype == np.uint16


def test_white_space_that_is_too_long_for_the_regex_gives_the_tokens_of_its_pieces() -> None:
    run = get_tokenizer().encode_ordinary("\n" * 1_000_000)  # one that ends the text is no trouble
    assert encode("a" + "\n" * 1_000_001 + "b").tolist() == [EOT, 64, *run, 198, 65]
    # where the regex does cope, cutting changes nothing
    text = "x\n\n" + " \u2003" * 700 + " y " + "\t" * 1500 + "z" + " " * 1200
    parts = _LONG_RUN_END.split(text)
    assert len(parts) == 3
    assert [t for part in parts for t in get_tokenizer().encode_ordinary(part)] == _reference([text])[1:]


def test_every_hundredth_document_is_val_and_each_split_is_its_documents_in_order(tmp_path: Path, corpus: str) -> None:
    manifest = _make(corpus, tmp_path / "out")
    texts = _texts(corpus)
    held_out = [texts[0], texts[100], texts[200]]
    assert _tokens(tmp_path / "out", "val") == _reference(held_out)
    assert _tokens(tmp_path / "out", "train") == _reference([text for text in texts if text not in held_out])
    assert manifest.documents == {"kept": 250, "null": 0, "empty": 0, "replaced": 0}
    train = [shard for shard in manifest.shards if "train" in shard.file]
    assert [shard.file for shard in train][:2] == ["corpus_train_000001.npy", "corpus_train_000002.npy"]
    assert {shard.tokens for shard in train[:-1]} == {1000}
    assert 0 < train[-1].tokens <= 1000
    assert verify(tmp_path / "out") == manifest


def test_two_documents_make_two_splits_and_of_one_the_last_tenth_is_val(tmp_path: Path) -> None:
    _make(_jsonl(tmp_path / "two.jsonl", ["", "val", None, "train"]), tmp_path / "two")
    assert (_tokens(tmp_path / "two", "val"), _tokens(tmp_path / "two", "train")) == ([EOT, 2100], [EOT, 27432])
    manifest = _make(_jsonl(tmp_path / "one.jsonl", [None, " a" * 999]), tmp_path / "one", shard_tokens=300)
    everything = _reference([" a" * 999])
    assert (_tokens(tmp_path / "one", "train"), _tokens(tmp_path / "one", "val")) == (
        everything[:900],
        everything[900:],
    )
    assert manifest.split == "the last tenth of the only document is val"


def test_documents_that_are_null_or_empty_are_skipped_and_damaged_ones_repaired_and_all_are_counted(
    tmp_path: Path,
) -> None:
    lines = [b'{"text": "a"}', b'{"text": null}', b'{"text": ""}', b'{"text": " \\n\\t"}']
    lines += [b'{"text": "b\xff"}', b'{"text": "c\\ud800"}', '{"text": "Zoë \\ud83d\\ude42"}'.encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    manifest = _make(str(tmp_path / "a.jsonl"), tmp_path / "out")
    assert manifest.documents == {"kept": 4, "null": 1, "empty": 2, "replaced": 2}
    assert _tokens(tmp_path / "out", "train") == _reference(["b\ufffd", "c\ufffd", "Zoë 🙂"])
    raw = pa.array([b"a", b"b\xff", None, b"Zo\xc3\xab"], pa.binary())
    text = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])  # Arrow does not look
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    manifest = _make(str(tmp_path / "a.parquet"), tmp_path / "out2")
    assert manifest.documents == {"kept": 3, "null": 1, "empty": 0, "replaced": 1}
    assert _tokens(tmp_path / "out2", "train") == _reference(["b\ufffd", "Zoë"])


class FakeFineweb:
    """FineWeb-EDU as the hub would give it: the same source in every respect but the network."""

    label, first_shard_is_val = "edufineweb", True

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def identity(self) -> dict[str, Any]:
        return {"source": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "revision": "c0ffee"}

    def read(self, begin: sources.Cursor | None) -> Any:
        start = (begin or {"record": 0})["record"]
        for record in range(start, len(self.texts), 7):
            values = self.texts[record : record + 7]
            yield sources.Chunk({"record": record}, {"record": record + 7}, list(values), None)


def test_fineweb_edu_has_build_nanogpt_s_names_and_layout(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = _texts(corpus)
    monkeypatch.setattr(prepare_module, "open_source", lambda *_, **__: FakeFineweb(texts))
    manifest = _make("fineweb-edu", tmp_path / "out")
    everything = _reference(texts)
    names = ["edufineweb_val_000000.npy"]
    names += [f"edufineweb_train_{i:06d}.npy" for i in range(1, -(-len(everything) // 1000))]
    assert sorted(shard.file for shard in manifest.shards) == sorted(names)
    for number, name in enumerate(names):
        tokens = np.load(tmp_path / "out" / name)
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == everything[1000 * number : 1000 * (number + 1)]
    with pytest.raises(ValueError, match="fills no train shard"):
        _make("fineweb-edu", tmp_path / "short", shard_tokens=10**6)


WORDS = ("a", " dog", "\n\n", " 漢字", "🙂", "<|endoftext|>", " 2024", "\t", "é")


@settings(max_examples=25)
@given(
    count=st.integers(2, 250),
    words=st.integers(1, 40),
    shard_tokens=st.integers(1, 40) | st.integers(40, 2000),
    options=st.fixed_dictionaries({"workers": st.integers(1, 4), "format": st.sampled_from(["npy", "bin"])}),
    chunk_records=st.integers(1, 60),
    fineweb=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_documents_in_shards_of_any_length_make_the_two_splits(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    words: int,
    shard_tokens: int,
    options: dict[str, Any],
    chunk_records: int,
    fineweb: bool,
    seed: int,
) -> None:
    """Of FineWeb-EDU shard 0 is val; of any other source every 100th document that is kept, from the first on."""
    rng, out = random.Random(seed), tmp_path_factory.mktemp("any")
    texts: list[Any] = [rng.choices(WORDS, k=rng.randrange(words)) for _ in range(count)]
    texts = ["".join(text) if rng.random() < 0.9 else None for text in texts]
    kept = [text for text in texts if text and not text.isspace()]
    everything = _reference(kept)
    val = everything[:shard_tokens] if fineweb else _reference(kept[::100])
    train = everything[shard_tokens:] if fineweb else _reference([t for i, t in enumerate(kept) if i % 100])
    if len(kept) == 1 and not fineweb:
        cut = len(everything) * 9 // 10
        train, val = everything[:cut], everything[cut:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_RECORDS", chunk_records)
        source = _jsonl(out / "x.jsonl", texts)
        if fineweb:
            source = "fineweb-edu"
            patch.setattr(prepare_module, "open_source", lambda *_, **__: FakeFineweb(texts))
        if not kept or not train:
            with pytest.raises(ValueError, match="holds no text" if not kept else "fills no train shard"):
                _make(source, out / "shards", shard_tokens=shard_tokens, **options)
            return
        manifest = _make(source, out / "shards", shard_tokens=shard_tokens, **options)
    for split, tokens in (("val", val), ("train", train)):
        assert _tokens(out / "shards", split) == tokens
        lengths = [entry.tokens for entry in manifest.shards if f"_{split}_" in entry.file]
        assert lengths == [min(shard_tokens, len(tokens) - at) for at in range(0, len(tokens), shard_tokens)]
    assert manifest.documents["kept"] == len(kept)
    assert verify(out / "shards") == manifest


def test_the_same_input_gives_the_same_bytes_with_any_number_of_workers(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(corpus, tmp_path / "one", workers=1)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "corpus.jsonl"
    copy.write_bytes(Path(corpus).read_bytes())
    monkeypatch.setattr(sources, "CHUNK_RECORDS", 7)
    _make(str(copy), tmp_path / "seven", workers=7)
    assert _files(tmp_path / "one") == _files(tmp_path / "seven")
    assert len(_files(tmp_path / "one")) > 10


def test_bin_shards_hold_the_tokens_of_the_npy_ones(tmp_path: Path, corpus: str) -> None:
    _make(corpus, tmp_path / "npy")
    manifest = _make(corpus, tmp_path / "bin", format="bin")
    assert {Path(shard.file).suffix for shard in manifest.shards} == {".bin"}
    for split in ("train", "val"):
        assert _tokens(tmp_path / "bin", split) == _tokens(tmp_path / "npy", split)


def test_the_manifest_says_where_the_shards_come_from_and_nothing_of_this_machine(tmp_path: Path, corpus: str) -> None:
    _make(corpus, tmp_path / "out")
    text = (tmp_path / "out" / "manifest.json").read_text()
    values = json.loads(text)
    assert values["source"] == {
        "source": "corpus.jsonl",
        "files": 1,
        "bytes": Path(corpus).stat().st_size,
        "sha256": hashlib.sha256(hashlib.sha256(Path(corpus).read_bytes()).digest()).hexdigest(),
    }
    assert values["tokenizer"] == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert values["options"] == {
        "source": "corpus.jsonl",
        "name": None,
        "revision": None,
        "text_column": "text",
        "shard_tokens": 1000,
        "format": "npy",
    }
    assert values["resume"] is None
    assert str(tmp_path) not in text
    for shard in values["shards"]:
        assert hashlib.sha256((tmp_path / "out" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


# -- interruptions -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


def _interrupt(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The process dies at the ``call``-th time that a file is about to appear or has just appeared."""
    calls = 0
    replace = os.replace

    def step() -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed

    def dying(source: Any, target: Any) -> None:
        step()
        replace(source, target)
        step()

    monkeypatch.setattr(os, "replace", dying)


@pytest.mark.parametrize("hold_out", [True, False])
def test_cut_at_any_file_it_goes_on_to_the_same_bytes(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, hold_out: bool
) -> None:
    monkeypatch.setattr(sources, "CHUNK_RECORDS", 11)
    monkeypatch.setattr(
        "gpt2_lightning.data.prepare.encode.VAL_EVERY", 4
    )  # several val shards, and val parts to take up
    if not hold_out:
        texts = _texts(corpus)
        monkeypatch.setattr(prepare_module, "open_source", lambda *_, **__: FakeFineweb(texts))
    source = corpus if hold_out else "fineweb-edu"
    _make(source, tmp_path / "whole")
    whole = _files(tmp_path / "whole")
    assert len([name for name in whole if "_val_" in name]) == (4 if hold_out else 1)
    assert len([name for name in whole if "_train_" in name]) > 8
    for call in range(1, 100):
        out = tmp_path / f"cut{call}"
        with monkeypatch.context() as patch:
            _interrupt(patch, call)
            try:
                _make(source, out)
            except Killed:
                pass
            else:
                break
        _make(source, out)
        assert _files(out) == whole, f"cut at {call}"
    assert call > 2 * len(whole)


def test_cut_again_and_again_every_run_gets_further(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(corpus, tmp_path / "whole")
    runs = 0
    while True:
        runs += 1
        with monkeypatch.context() as patch:
            _interrupt(patch, 9)  # a few steps, at least one of them a shard and its manifest
            try:
                _make(corpus, tmp_path / "out")
            except Killed:
                continue
            break
    assert runs > 4
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


def test_what_is_finished_is_not_tokenized_again(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_RECORDS", 5)
    with monkeypatch.context() as patch:
        _interrupt(patch, 22)  # the first manifest, then four finished shards with theirs
        with pytest.raises(Killed):
            _make(corpus, tmp_path / "out")
    assert len(list_shards(tmp_path / "out", "train")) >= 4
    seen: list[str] = []
    monkeypatch.setattr("gpt2_lightning.data.prepare.encode.encode", lambda text: seen.append(text) or encode(text))
    manifest = _make(corpus, tmp_path / "out")
    done = 4000  # tokens in finished shards
    total = manifest.tokens("train") + manifest.tokens("val")
    assert len(_reference(seen)) < total - done + 1000  # at most the chunk in which the shard ended is done again


def test_a_finished_folder_returns_at_once_even_without_its_source(tmp_path: Path, corpus: str) -> None:
    manifest = _make(corpus, tmp_path / "out")
    before = _files(tmp_path / "out")
    Path(corpus).unlink()
    (tmp_path / "out").chmod(0o555)  # nothing is written
    assert _make(corpus, tmp_path / "out") == manifest
    (tmp_path / "out").chmod(0o755)
    assert _files(tmp_path / "out") == before
    assert ".lock" not in before


def test_a_source_that_changed_is_not_passed_off_as_the_old_one(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        _interrupt(patch, 9)
        with pytest.raises(Killed):
            _make(corpus, tmp_path / "cut")
    _make(corpus, tmp_path / "whole")
    text = Path(corpus).read_text()
    Path(corpus).write_text(text.replace("Document 7", "Dokument 7"))
    with pytest.raises(ValueError, match=r"cut holds shards made otherwise \(sha256 is .* there and .* here\)"):
        _make(corpus, tmp_path / "cut")
    Path(corpus).write_text(text + '{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"whole holds shards made otherwise \(bytes is \d+ there and \d+ here\)"):
        _make(corpus, tmp_path / "whole")


def test_other_options_are_refused_with_the_difference(tmp_path: Path, corpus: str) -> None:
    _make(corpus, tmp_path / "out")
    before = _files(tmp_path / "out")
    for change, difference in (
        ({"shard_tokens": 2000}, "shard_tokens is 1000 there and 2000 here"),
        ({"format": "bin"}, "format is npy there and bin here"),
        ({"text_column": "body", "shard_tokens": 5}, "text_column is text there and body here; shard_tokens is 1000"),
        ({"source": "stdlib"}, r"source is corpus\.jsonl there and stdlib here"),
    ):
        with pytest.raises(ValueError, match=difference):
            _make(**{"source": corpus, "out": tmp_path / "out"} | change)
    assert _files(tmp_path / "out") == before


def test_a_folder_without_a_shard_takes_other_options(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(ValueError, match="line 1 has no 'body'"):
        _make(corpus, tmp_path / "out", text_column="body")
    assert _make(corpus, tmp_path / "out").complete


def test_published_shards_are_neither_added_to_nor_needed_again(tmp_path: Path, corpus: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shards.write_shard(out / "x_train_000001.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(ValueError, match="holds shards without a manifest"):
        _make(corpus, out)
    ensure_prepared(corpus, out)
    assert [path.name for path in out.iterdir()] == ["x_train_000001.npy"]


def test_fit_takes_a_prepared_folder_with_the_options_it_has(tmp_path: Path, corpus: str) -> None:
    _make(corpus, tmp_path / "out", format="bin")
    before = _files(tmp_path / "out")
    ensure_prepared(corpus, tmp_path / "out")
    assert _files(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"source is .* there and stdlib here"):
        ensure_prepared("stdlib", tmp_path / "out")
    ensure_prepared(corpus, tmp_path / "new")
    manifest = read_manifest(tmp_path / "new")
    assert manifest is not None
    assert (manifest.complete, manifest.options["shard_tokens"]) == (True, 100_000_000)


def test_of_many_at_once_one_works_and_all_return_the_same(tmp_path: Path, corpus: str) -> None:
    _make(corpus, tmp_path / "alone")
    manifests: list[Manifest] = []
    threads = [
        threading.Thread(target=lambda: manifests.append(_make(corpus, tmp_path / "out", workers=1))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(manifests) == 5
    assert {manifest == manifests[0] for manifest in manifests} == {True}
    assert _files(tmp_path / "out") == _files(tmp_path / "alone")


# -- bad days ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_one_sentence_and_after_room_is_made_it_goes_on(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    _make(corpus, tmp_path / "whole")
    whole = _files(tmp_path / "whole")
    for call in range(1, 12):
        out, calls = tmp_path / f"out{call}", 0
        fsync = os.fsync

        def full(file: int, call: int = call) -> None:
            nonlocal calls
            calls += 1
            if calls >= call:
                raise OSError(code, os.strerror(code))
            fsync(file)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(ValueError, match=r"cannot be written \(.*\): make room and run the same command again"):
                _make(corpus, out)
        finished = {name: digest for name, digest in _files(out).items() if name.endswith(".npy")}
        assert finished.items() <= whole.items()
        assert not list(out.glob(".*.tmp"))
        _make(corpus, out)
        assert _files(out) == whole


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX permissions")
def test_no_permission_and_a_file_in_the_way_are_one_sentence(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"corpus\.jsonl.* cannot be .*"):
        _make(corpus, Path(corpus))

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # chmod would not stop root
    with pytest.raises(ValueError, match=r"new cannot be written \(Permission denied\): give this user the right"):
        _make(corpus, tmp_path / "new")


@pytest.mark.parametrize("texts", [[], ["", " "], [None, None]])
def test_an_empty_corpus_is_one_sentence(tmp_path: Path, texts: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl holds no text \(\d null and \d empty documents\)"):
        _make(_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out")


def test_a_source_that_fails_half_way_keeps_the_finished_shards(tmp_path: Path, corpus: str) -> None:
    content = Path(corpus).read_bytes()
    Path(corpus).write_bytes(content + b"{broken\n")
    with pytest.raises(ValueError, match="line 251 is not JSON"):
        _make(corpus, tmp_path / "out", shard_tokens=10)
    assert not (tmp_path / "out" / "manifest.json.tmp").exists()
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert not manifest.complete
    with pytest.raises(ValueError, match="only partly prepared"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard_tokens": 0}, "shard_tokens is 0: give a whole number of at least 1"),
        ({"shard_tokens": 2**31}, "shard_tokens is 2147483648: .* below 2147483648"),
        ({"workers": 0}, "workers is 0 .*: give at least 1 worker"),
        ({"format": "txt"}, "format txt: give .* npy or bin"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, corpus: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        _make(corpus, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_bar_counts_tokens_and_documents_and_knows_the_end(
    tmp_path: Path, corpus: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_RECORDS", 50)
    manifest = _make(corpus, tmp_path / "out", progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    tokens = (manifest.tokens("train") + manifest.tokens("val")) / 1000
    assert f"100%|██████████| {tokens:.1f}k/{tokens:.1f}k [" in last
    assert "tok/s, 250 documents]" in last


def test_prepare_imports_neither_torch_nor_lightning(tmp_path: Path, corpus: str) -> None:
    program = (
        "import sys; from gpt2_lightning.data.prepare.write import prepare;"
        f"prepare({corpus!r}, {str(tmp_path / 'out')!r}, progress=False);"
        "print({'torch', 'lightning', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
