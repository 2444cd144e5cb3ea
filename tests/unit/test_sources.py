"""Documents from every kind of file, the standard library, and a hub dataset whose network fails."""

import gzip
import json
import lzma
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2_lightning.data.prepare import sources
from gpt2_lightning.data.prepare.documents import Document
from gpt2_lightning.data.prepare.sources import (
    Chunk,
    Cursor,
    FileSource,
    HubSource,
    Source,
    canonical_name,
    open_source,
)

DOCUMENTS = ["first", None, "", "Zoë 🙂", "fifth\n"]
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in DOCUMENTS).encode()


def write_file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def write_parquet(path: Path, texts: list[Any], row_group_size: int = 2, kind: pa.DataType | None = None) -> str:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def read_all(source: Source, start: Cursor | None = None) -> list[Document]:
    return [document for chunk in source.read(start) for document in chunk.documents]


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda root: write_file(root / "a.jsonl", LINES),
        lambda root: write_file(root / "a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n").rstrip()),
        lambda root: write_file(root / "a.jsonl.gz", gzip.compress(LINES[:20]) + gzip.compress(LINES[20:])),
        lambda root: write_file(root / "a.jsonl.xz", lzma.compress(LINES)),
        lambda root: write_parquet(root / "a.parquet", DOCUMENTS),
        lambda root: write_parquet(root / "a.parquet", DOCUMENTS, kind=pa.large_string()),
    ],
)
def test_every_format_gives_the_same_documents_from_every_position(tmp_path: Path, make: Callable[[Path], str]) -> None:
    source = open_source(make(tmp_path))
    assert read_all(source) == DOCUMENTS
    for number in range(6):
        assert read_all(source, {"file": 0, "document": number}) == DOCUMENTS[number:]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    source = open_source(write_file(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\n\nthree"))
    assert read_all(source) == ["one\ntwo\n\nthree"]
    assert read_all(source, {"file": 0, "document": 1}) == []


def test_reading_resumes_after_any_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_DOCUMENTS", 3)
    write_parquet(tmp_path / "a.parquet", [f"a{i}" for i in range(7)])
    write_file(tmp_path / "b.txt", b"b")
    write_file(tmp_path / "c.jsonl", b'{"text": "c0"}\n{"text": "c1"}\n')
    source = open_source(str(tmp_path / "*"))
    chunks = list(source.read(None))
    everything = ["a0", "a1", "a2", "a3", "a4", "a5", "a6", "b", "c0", "c1"]
    assert read_all(source) == everything
    assert [len(chunk.documents) for chunk in chunks] == [3, 3, 3, 1]
    assert chunks[-1].progress == 1.0
    for number, chunk in enumerate(chunks, 1):
        assert read_all(source, chunk.end) == everything[3 * number :]


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "bca":
        write_file(tmp_path / f"{name}.txt", name.encode())
    write_file(tmp_path / "[x].txt", b"brackets")
    assert read_all(open_source("[a-c].txt")) == ["a", "b", "c"]
    assert read_all(open_source(["c.txt", "[ab].txt"])) == ["c", "a", "b"]
    assert read_all(open_source("[x].txt")) == ["brackets"]
    assert (open_source("a.txt").label, open_source("[a-c].txt").label) == ("a", "corpus")


def test_stdlib_is_the_library_of_this_python_without_its_tests() -> None:
    source = open_source("stdlib")
    assert isinstance(source, FileSource)
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in source.paths]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py", "tokenize.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/")[:-1])]
    assert sum(path.stat().st_size for path in source.paths) > 8_000_000  # ≈ 12 MB in CPython 3.11 to 3.14
    assert source.identity().keys() == {"source", "python", "files", "bytes", "sha256"}
    assert next(iter(source.read(None))).documents[0] == source.paths[0].read_text()


def test_manifests_name_sources_without_aliases_and_folders() -> None:
    assert canonical_name("fineweb-edu", None) == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert canonical_name("fineweb-edu", "sample-100BT") == ("HuggingFaceFW/fineweb-edu", "sample-100BT")
    assert canonical_name("org/name", None) == ("org/name", None)
    assert canonical_name("stdlib", None) == ("stdlib", None)
    assert canonical_name("/home/her/corpus/*.jsonl", None) == ("*.jsonl", None)
    assert canonical_name(["/a/x.txt", "b/y.parquet"], None) == (["x.txt", "y.parquet"], None)


def parquet_bytes(column: str, values: list[Any]) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table({column: values}), buffer, row_group_size=100)
    return buffer.getvalue().to_pybytes()


PARQUET = parquet_bytes("text", [str(i) * 100 for i in range(1000)])
MIDDLE = len(PARQUET) // 2


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'\n{"body": "x"}\n', "line 2 has no 'text': set --text_column to one of body"),
        ("a.jsonl", b'["x"]\n', "line 1 is not an object"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 has int under 'text', not text"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], "is damaged after line"),
        ("a.jsonl.gz", LINES, "is damaged after line 0"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-9], "is damaged after line"),
        ("a.parquet", parquet_bytes("body", ["x"]), "has no column 'text': set --text_column to one of body"),
        ("a.parquet", parquet_bytes("text", [3]), "has int64 in column 'text', not text"),
        ("a.parquet", parquet_bytes("text", [b"x"]), "has binary in column 'text', not text"),
        ("a.parquet", parquet_bytes("text", [["x"]]), "has list<element: string> in column 'text', not text"),
        ("a.parquet", b"PAR1 and no more", "is not a whole parquet file"),
        ("a.parquet", PARQUET[:MIDDLE], "is not a whole parquet file"),
        ("a.parquet", PARQUET[:MIDDLE] + bytes(300) + PARQUET[MIDDLE + 300 :], "is not a whole parquet file"),
    ],
)
def test_the_message_for_a_damaged_file_names_it_and_the_line(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = write_file(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"^{path} {reason}") as error:
        read_all(open_source(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (["a.doc", "*.txt"], r"there is no file \*\.txt: correct the path"),
        (["folder", "a.doc"], r"folder is a folder: name its files, for example folder/\*\.jsonl"),
        (["a.doc", "a.doc"], r"a\.doc has an unknown file type: convert it to one of \.txt"),
        ("fineweb", "'fineweb' is not a source: give stdlib, fineweb-edu, ORG/NAME"),
        (["org/name", "other/name"], "is not a source"),
    ],
)
def test_what_is_not_a_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    write_file(tmp_path / "a.doc", b"x")
    with pytest.raises(ValueError, match=reason):
        open_source(source)
    with pytest.raises(ValueError, match="only datasets on the hub have a --name or a --revision"):
        open_source("stdlib", name="x")


# -- the hub -----------------------------------------------------------------------------------------------------------


class FakeDataset:
    """As much of `datasets.IterableDataset` as is used: three files of four documents, which fail as planned."""

    num_shards = 3

    def __init__(self, failures: list[tuple[int, int, Exception]]) -> None:
        self.failures = failures  # (file, documents yielded before it fails, the error), used up in order
        self.file = -1

    def shard(self, num_shards: int, index: int) -> "FakeDataset":
        assert num_shards == 3
        self.file = index
        return self

    def with_format(self, kind: str) -> "FakeDataset":
        assert kind == "arrow"
        return self

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        for row in range(4):
            if self.failures and self.failures[0][:2] == (self.file, row):
                raise self.failures.pop(0)[2]
            yield pa.table({"text": [f"{self.file}.{row}"]})


EVERYTHING = [f"{file}.{row}" for file in range(3) for row in range(4)]


def hub_source(failures: list[tuple[int, int, Exception]], repo: str = "org/name", column: str = "text") -> HubSource:
    return HubSource(repo, None, "c0ffee", column, 12, FakeDataset(failures))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds slept so far; time passes in sleep only."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    return slept


def test_a_hub_dataset_resumes_after_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_DOCUMENTS", 5)
    chunks: list[Chunk] = list(hub_source([]).read(None))
    assert [chunk.progress for chunk in chunks] == [5 / 12, 10 / 12, 1.0]
    for number, chunk in enumerate(chunks, 1):
        assert read_all(hub_source([]), chunk.end) == EVERYTHING[5 * number :]


@pytest.mark.parametrize("chunk_documents", [1, 3, 100])
def test_after_any_failure_no_document_is_missing_or_repeated(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float], chunk_documents: int
) -> None:
    monkeypatch.setattr(sources, "CHUNK_DOCUMENTS", chunk_documents)
    for file in range(3):
        for row in range(4):
            pauses.clear()
            failures = [(file, row, ConnectionError("reset")), (file, row, TimeoutError("silence"))]
            assert read_all(hub_source([*failures, (2, 3, pa.ArrowInvalid("cut"))])) == EVERYTHING
            assert len(pauses) == 3


def test_an_outage_is_waited_out_for_ten_to_twenty_minutes(
    monkeypatch: pytest.MonkeyPatch, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "CHUNK_DOCUMENTS", 2)
    with pytest.raises(ValueError, match=r"org/name fails after document 6 \(unreachable\): run the same command"):
        read_all(hub_source([(1, 3, ConnectionError("unreachable\nand more"))] * 1000))
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert 600 <= sum(pauses) <= 1200
    assert "org/name fails after document 6 (unreachable): trying again in 1 s" in capsys.readouterr().err


def test_each_document_that_arrives_restarts_the_wait(monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    monkeypatch.setattr(sources, "CHUNK_DOCUMENTS", 1)
    failures = [(file, row, ConnectionError("gone")) for file in range(3) for row in range(4) for _ in range(12)]
    assert read_all(hub_source(list(failures))) == EVERYTHING
    assert sum(pauses) > 1200


def test_damaged_data_is_given_up_after_a_minute_and_a_missing_column_at_once(pauses: list[float]) -> None:
    with pytest.raises(ValueError, match="org/name has no column 'body': set --text_column to one of text"):
        read_all(hub_source([], column="body"))
    assert pauses == []
    with pytest.raises(ValueError, match="org/name fails after document 0"):
        read_all(hub_source([(0, 2, pa.ArrowInvalid("not parquet"))] * 1000))
    assert 0 < sum(pauses) <= 60


def test_only_fineweb_edu_holds_out_its_first_shard() -> None:
    assert (hub_source([]).label, hub_source([]).first_shard_is_val) == ("name", False)
    fineweb = hub_source([], "HuggingFaceFW/fineweb-edu")
    assert (fineweb.label, fineweb.first_shard_is_val) == ("edufineweb", True)
