"""Documents to shards: the tokens, the split, the same bytes after every interruption, and what is refused."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_lightning.data.prepare import encode, sources, write
from gpt2_lightning.data.prepare.write import ensure_prepared, prepare
from gpt2_lightning.data.shards import (
    Manifest,
    TokenStream,
    list_shards,
    read_manifest,
    verify,
    write_manifest,
    write_shard,
)
from gpt2_lightning.tokenizer import get_tokenizer

EOT = 50256


def write_jsonl(path: Path, texts: list[Any]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Syncing guards against power cuts, which no test makes."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


TEXTS = [f"Document {i}. " + f"word{i} again, " * (i % 23) for i in range(250)]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """250 documents, ≈ 15,000 tokens."""
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


def reference_tokens(texts: list[str]) -> list[int]:
    """As in build-nanogpt: <|endoftext|>, then the document's tokens."""
    return [token for text in texts for token in [EOT, *get_tokenizer().encode_ordinary(text)]]


def read_tokens(root: Path, split: Any) -> list[int]:
    stream = TokenStream(list_shards(root, split))
    return stream.read(np.array([0]), len(stream))[0].tolist()


def hashes(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def make(source: str | list[str], out: Path, **options: Any) -> Manifest:
    return prepare(source, out, **{"shard_tokens": 1500, "workers": 2, "progress": False} | options)


class FakeFineweb:
    """FineWeb-EDU without the network."""

    label, first_shard_is_val = "edufineweb", True

    def __init__(self, texts: list[Any]) -> None:
        self.texts = texts

    def identity(self) -> dict[str, Any]:
        return {"source": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "revision": "c0ffee"}

    def read(self, start: sources.Cursor | None) -> Iterator[sources.Chunk]:
        for number in range((start or {"document": 0})["document"], len(self.texts), 7):
            yield sources.Chunk(self.texts[number : number + 7], {"document": number + 7}, None)


# -- tokens and split --------------------------------------------------------------------------------------------------


def test_documents_begin_with_end_of_text_and_special_tokens_in_them_stay_text() -> None:
    assert encode.encode_document("Hello world").tolist() == [50256, 15496, 995]
    assert encode.encode_document("<|endoftext|>").tolist() == [50256, 27, 91, 437, 1659, 5239, 91, 29]
    assert encode.encode_document("Hello world").dtype == np.uint16


def test_white_space_too_long_for_the_regex_has_the_tokens_of_its_pieces() -> None:
    run = get_tokenizer().encode_ordinary("\n" * 1_000_000)  # the regex can match a run that ends the text
    assert encode.encode_document("a" + "\n" * 1_000_001 + "b").tolist() == [EOT, 64, *run, 198, 65]
    # cutting does not change the tokens of shorter runs, which the regex can match
    text = "x\n\n" + " \u2003" * 700 + " y " + "\t" * 1500 + "z" + " " * 1200
    parts = encode.split_long_white_space(text)
    assert len(parts) == 3
    assert [t for part in parts for t in get_tokenizer().encode_ordinary(part)] == reference_tokens([text])[1:]


def test_two_documents_fill_two_splits_and_of_one_the_last_tenth_is_val(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    make(write_jsonl(tmp_path / "two.jsonl", ["", "val", None, "train"]), two)
    assert (read_tokens(two, "val"), read_tokens(two, "train")) == ([EOT, 2100], [EOT, 27432])
    manifest = make(write_jsonl(tmp_path / "one.jsonl", [None, " a" * 999]), one, shard_tokens=300)
    tokens = reference_tokens([" a" * 999])
    assert (read_tokens(one, "train"), read_tokens(one, "val")) == (tokens[:900], tokens[900:])
    assert manifest.split == "the last tenth of the only document is val"


def test_null_and_empty_documents_are_skipped_and_bytes_that_are_not_utf8_replaced_and_both_counted(
    tmp_path: Path,
) -> None:
    lines = [b'{"text": "a"}', b'{"text": null}', b'{"text": ""}', b'{"text": " \\n\\t"}']
    lines += [b'{"text": "b\xff"}', b'{"text": "c\\ud800"}', '{"text": "Zoë \\ud83d\\ude42"}'.encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    manifest = make(str(tmp_path / "a.jsonl"), tmp_path / "out")
    assert manifest.documents == {"kept": 4, "null": 1, "empty": 2, "replaced": 2}
    assert read_tokens(tmp_path / "out", "train") == reference_tokens(["b\ufffd", "c\ufffd", "Zoë 🙂"])
    raw = pa.array([b"a", b"b\xff", None, b"Zo\xc3\xab"], pa.binary())
    text = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])  # Arrow does not check
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    manifest = make(str(tmp_path / "a.parquet"), tmp_path / "out2")
    assert manifest.documents == {"kept": 3, "null": 1, "empty": 0, "replaced": 1}
    assert read_tokens(tmp_path / "out2", "train") == reference_tokens(["b\ufffd", "Zoë"])


def test_fineweb_edu_has_the_file_names_of_build_nanogpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "open_source", lambda *_, **__: FakeFineweb(TEXTS))
    make("fineweb-edu", tmp_path / "out", shard_tokens=4000)
    names = [f"edufineweb_{split}_{i:06d}.npy" for i, split in enumerate(["val", "train", "train", "train"])]
    assert sorted(hashes(tmp_path / "out")) == sorted([*names, "manifest.json"])
    with pytest.raises(ValueError, match="too few for a val and a train shard: lower --shard_tokens"):
        make("fineweb-edu", tmp_path / "short", shard_tokens=10**6)
    make("fineweb-edu", tmp_path / "short", shard_tokens=10**4)


WORDS = ("a", " dog", "\n\n", " 漢字", "🙂", "<|endoftext|>", " 2024", "\t", "é")


@settings(max_examples=25)
@given(
    count=st.integers(2, 250),
    words=st.integers(1, 40),
    shard_tokens=st.integers(1, 40) | st.integers(40, 2000),
    options=st.fixed_dictionaries({"workers": st.integers(1, 4), "format": st.sampled_from(["npy", "bin"])}),
    chunk_documents=st.integers(1, 60),
    fineweb=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_shards_of_any_length_hold_the_documents_of_their_split_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    words: int,
    shard_tokens: int,
    options: dict[str, Any],
    chunk_documents: int,
    fineweb: bool,
    seed: int,
) -> None:
    """For FineWeb-EDU shard 0 is val; for any other source every 100th document that is kept, from the first on."""
    rng, out = random.Random(seed), tmp_path_factory.mktemp("any")
    texts: list[Any] = ["".join(rng.choices(WORDS, k=rng.randrange(words))) for _ in range(count)]
    texts = [text if rng.random() < 0.9 else None for text in texts]
    kept = [text for text in texts if text and not text.isspace()]
    everything = reference_tokens(kept)
    val = everything[:shard_tokens] if fineweb else reference_tokens(kept[::100])
    train = everything[shard_tokens:] if fineweb else reference_tokens([t for i, t in enumerate(kept) if i % 100])
    if len(kept) == 1 and not fineweb:
        cut = len(everything) * 9 // 10
        train, val = everything[:cut], everything[cut:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_DOCUMENTS", chunk_documents)
        source = write_jsonl(out / "x.jsonl", texts)
        if fineweb:
            source = "fineweb-edu"
            patch.setattr(write, "open_source", lambda *_, **__: FakeFineweb(texts))
        if not kept or not train:
            with pytest.raises(ValueError, match="has no text" if not kept else "too few for a val and a train shard"):
                make(source, out / "shards", shard_tokens=shard_tokens, **options)
            return
        manifest = make(source, out / "shards", shard_tokens=shard_tokens, **options)
    for split, tokens in (("val", val), ("train", train)):
        assert read_tokens(out / "shards", split) == tokens
        lengths = [entry.tokens for entry in manifest.shards if f"_{split}_" in entry.file]
        assert lengths == [min(shard_tokens, len(tokens) - at) for at in range(0, len(tokens), shard_tokens)]
    assert manifest.documents["kept"] == len(kept)
    assert verify(out / "shards") == manifest


def test_workers_chunks_and_the_folder_of_the_source_do_not_change_the_bytes(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(corpus, tmp_path / "one", workers=1)
    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "corpus.jsonl"
    copy.write_bytes(Path(corpus).read_bytes())
    monkeypatch.setattr(sources, "CHUNK_DOCUMENTS", 7)
    make(str(copy), tmp_path / "seven", workers=7)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "seven")
    assert len(hashes(tmp_path / "one")) > 8


def test_the_manifest_describes_the_source_and_nothing_of_this_machine(tmp_path: Path, corpus: str) -> None:
    make(corpus, tmp_path / "out")
    text = (tmp_path / "out" / "manifest.json").read_text()
    values = json.loads(text)
    content = Path(corpus).read_bytes()
    sha256 = hashlib.sha256(hashlib.sha256(content).digest()).hexdigest()
    assert values["source"] == {"source": "corpus.jsonl", "files": 1, "bytes": len(content), "sha256": sha256}
    assert values["tokenizer"] == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert values["options"] == {
        "source": "corpus.jsonl",
        "name": None,
        "revision": None,
        "text_column": "text",
        "shard_tokens": 1500,
        "format": "npy",
    }
    assert values["resume"] is None
    assert str(tmp_path) not in text
    for shard in values["shards"]:
        assert hashlib.sha256((tmp_path / "out" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


# -- interruptions -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing of ours may catch it."""


def make_killed(monkeypatch: pytest.MonkeyPatch, call: int, source: str, out: Path) -> bool:
    """Runs `make` until the ``call``-th moment just before or after a file appears. Returns whether it got there."""
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

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        try:
            make(source, out)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("hold_out", [True, False])
def test_killed_at_any_file_it_resumes_to_the_same_bytes(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, hold_out: bool
) -> None:
    monkeypatch.setattr(sources, "CHUNK_DOCUMENTS", 11)
    monkeypatch.setattr(encode, "VAL_EVERY", 4)  # several val shards, and unfinished ones to resume
    if not hold_out:
        monkeypatch.setattr(write, "open_source", lambda *_, **__: FakeFineweb(TEXTS))
    source = corpus if hold_out else "fineweb-edu"
    make(source, tmp_path / "whole")
    whole = hashes(tmp_path / "whole")
    assert len([name for name in whole if "_val_" in name]) == (3 if hold_out else 1)
    assert len([name for name in whole if "_train_" in name]) > 5
    call = 1
    while make_killed(monkeypatch, call, source, out := tmp_path / f"killed{call}"):
        make(source, out)
        assert hashes(out) == whole, f"killed at {call}"
        call += 1
    assert call > 4 * len(whole)


def test_what_is_saved_is_not_tokenized_again(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_DOCUMENTS", 5)
    assert make_killed(monkeypatch, 30, corpus, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.resume is not None
    saved = sum(shard.tokens for shard in manifest.shards)
    assert saved >= 3000
    saved += manifest.resume["train"]["tokens"] + manifest.resume["val"]["tokens"]
    seen: list[str] = []
    encode_document = encode.encode_document
    monkeypatch.setattr(encode, "encode_document", lambda text: seen.append(text) or encode_document(text))
    make(corpus, tmp_path / "out")
    assert saved + len(reference_tokens(seen)) == len(reference_tokens(TEXTS))


def test_a_resume_that_lacks_what_it_needs_is_refused(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sources, "CHUNK_DOCUMENTS", 11)
    assert make_killed(monkeypatch, 30, corpus, out)
    manifest = read_manifest(out)
    assert manifest is not None
    for partial in out.glob(".partial_*"):
        partial.unlink()
    with pytest.raises(ValueError, match=r"\.partial_corpus_\w+\.npy is missing: delete the folder"):
        make(corpus, out)
    old = {"cursor": {"file": 0, "record": 9}, "skip": 3, "train_shard": 2, "val_shard": 0, "val_tokens": 5}
    write_manifest(out, Manifest(**vars(manifest) | {"resume": old}))
    with pytest.raises(ValueError, match="another version of this program prepared"):
        make(corpus, out)


def test_a_complete_folder_returns_at_once_even_without_its_source(tmp_path: Path, corpus: str) -> None:
    manifest = make(corpus, tmp_path / "out")
    before = hashes(tmp_path / "out")
    Path(corpus).unlink()
    (tmp_path / "out").chmod(0o555)  # nothing is written
    assert make(corpus, tmp_path / "out") == manifest
    (tmp_path / "out").chmod(0o755)
    assert hashes(tmp_path / "out") == before
    assert ".lock" not in before


def test_a_source_that_changed_is_refused(tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_killed(monkeypatch, 12, corpus, tmp_path / "partial")
    make(corpus, tmp_path / "whole")
    text = Path(corpus).read_text()
    Path(corpus).write_text(text.replace("Document 7", "Dokument 7"))
    with pytest.raises(ValueError, match=r"partial holds shards of another source .*\(sha256 is .* there and .* here"):
        make(corpus, tmp_path / "partial")
    Path(corpus).write_text(text + '{"text": "more"}\n')
    with pytest.raises(ValueError, match=r"whole holds shards of another source .*\(bytes is \d+ there and \d+ here"):
        make(corpus, tmp_path / "whole")


def test_other_options_are_refused_with_the_difference(tmp_path: Path, corpus: str) -> None:
    make(corpus, tmp_path / "out")
    before = hashes(tmp_path / "out")
    for change, difference in (
        ({"format": "bin"}, "format is npy there and bin here"),
        ({"text_column": "body", "shard_tokens": 5}, "text_column is text there and body here; shard_tokens is 1500"),
        ({"source": "stdlib"}, r"source is corpus\.jsonl there and stdlib here"),
    ):
        with pytest.raises(ValueError, match=difference):
            make(**{"source": corpus, "out": tmp_path / "out"} | change)
    assert hashes(tmp_path / "out") == before


def test_a_folder_without_shards_accepts_other_options(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(ValueError, match="line 1 has no 'body'"):
        make(corpus, tmp_path / "out", text_column="body")
    assert make(corpus, tmp_path / "out").complete


def test_published_shards_are_used_as_they_are_and_never_added_to(tmp_path: Path, corpus: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_shard(out / "x_train_000001.npy", np.arange(9, dtype=np.uint16))
    with pytest.raises(ValueError, match="holds shards without a manifest"):
        make(corpus, out)
    ensure_prepared(corpus, out)
    assert [path.name for path in out.iterdir()] == ["x_train_000001.npy"]


def test_fit_uses_a_prepared_folder_with_the_options_it_has(tmp_path: Path, corpus: str) -> None:
    make(corpus, tmp_path / "out", format="bin")
    before = hashes(tmp_path / "out")
    ensure_prepared(corpus, tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    with pytest.raises(ValueError, match=r"source is .* there and stdlib here"):
        ensure_prepared("stdlib", tmp_path / "out")
    ensure_prepared([corpus], tmp_path / "new")
    manifest = read_manifest(tmp_path / "new")
    assert manifest is not None
    assert (manifest.complete, manifest.options["shard_tokens"]) == (True, 100_000_000)


def test_of_several_at_once_one_works_and_all_return_the_same(tmp_path: Path, corpus: str) -> None:
    alone = make(corpus, tmp_path / "alone")
    manifests: list[Manifest] = []
    threads = [threading.Thread(target=lambda: manifests.append(make(corpus, tmp_path / "out"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert manifests == [alone] * 5
    assert hashes(tmp_path / "out") == hashes(tmp_path / "alone")


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_short_message_and_once_there_is_space_it_resumes(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(corpus, tmp_path / "whole")
    whole = hashes(tmp_path / "whole")
    for call in range(1, 12):
        out, calls = tmp_path / f"out{call}", 0

        def sync(file: int, call: int = call) -> None:
            nonlocal calls
            calls += 1
            if calls >= call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\): free some space and"):
                make(corpus, out)
        finished = {name: digest for name, digest in hashes(out).items() if name.startswith("corpus_")}
        assert finished.items() <= whole.items()
        assert not list(out.glob(".*.tmp"))
        make(corpus, out)
        assert hashes(out) == whole


def test_no_permission_and_a_file_in_the_way_are_short_messages(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"corpus\.jsonl cannot be written \(File exists\)"):
        make(corpus, Path(corpus))

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)  # chmod would not stop root
    with pytest.raises(ValueError, match=r"new cannot be written \(Permission denied\): change its permissions"):
        make(corpus, tmp_path / "new")


@pytest.mark.parametrize("texts", [[], ["", " "], [None, None]])
def test_a_source_without_text_is_a_short_message(tmp_path: Path, texts: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl has no text \(\d null and \d empty documents\)"):
        make(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out")


def test_a_source_that_fails_half_way_leaves_a_folder_that_is_not_mistaken_for_whole(
    tmp_path: Path, corpus: str
) -> None:
    Path(corpus).write_bytes(Path(corpus).read_bytes() + b"{broken\n")
    with pytest.raises(ValueError, match="line 251 is not JSON"):
        make(corpus, tmp_path / "out", shard_tokens=10)
    with pytest.raises(ValueError, match="only partly prepared"):
        verify(tmp_path / "out")


def test_prepare_imports_neither_torch_nor_lightning(tmp_path: Path, corpus: str) -> None:
    program = (
        "import sys; from gpt2_lightning.data.prepare.write import prepare;"
        f"prepare({corpus!r}, {str(tmp_path / 'out')!r}, progress=False);"
        "print({'torch', 'lightning', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
