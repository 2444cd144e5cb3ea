"""Documents in: each kind of file, the standard library, a hub dataset whose network fails; all can be gone on with."""

import gzip
import json
import lzma
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2_lightning.data.prepare import sources
from gpt2_lightning.data.prepare.sources import Chunk, Cursor, HubSource, Source, canonical, open_source

DOCUMENTS = ["first", None, "", "Zoë 🙂", "fifth\n"]
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in DOCUMENTS).encode()


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def _values(source: Source, begin: Cursor | None = None) -> list[Any]:
    """The documents from a place on, as text."""
    values = [value for chunk in source.read(begin) for value in chunk.values]
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def _parquet(path: Path, texts: list[Any], row_group_size: int = 2, kind: pa.DataType | None = None) -> str:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, kind or pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda root: _write(root / "a.jsonl", LINES),
        lambda root: _write(root / "a.jsonl", LINES.rstrip(b"\n")),
        lambda root: _write(root / "a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")),
        lambda root: _write(root / "a.jsonl.gz", gzip.compress(LINES)),
        lambda root: _write(root / "a.jsonl.gz", gzip.compress(LINES[:20]) + gzip.compress(LINES[20:])),
        lambda root: _write(root / "a.jsonl.xz", lzma.compress(LINES)),
        lambda root: _parquet(root / "a.parquet", DOCUMENTS),
        lambda root: _parquet(root / "a.parquet", DOCUMENTS, kind=pa.large_string()),
    ],
)
def test_every_format_gives_the_same_documents_from_every_place_on(tmp_path: Path, make: Callable[[Path], str]) -> None:
    source = open_source(make(tmp_path))
    assert _values(source) == DOCUMENTS
    for record in range(6):
        assert _values(source, {"file": 0, "record": record}) == DOCUMENTS[record:]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    source = open_source(_write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo\n\nthree"))
    assert _values(source) == ["one\ntwo\n\nthree"]
    assert _values(source, {"file": 0, "record": 1}) == []


def test_chunks_follow_on_each_other_and_each_place_between_them_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_RECORDS", 3)
    _parquet(tmp_path / "a.parquet", [f"a{i}" for i in range(7)])
    _write(tmp_path / "b.txt", b"b")
    _write(tmp_path / "c.jsonl", b'{"text": "c0"}\n{"text": "c1"}\n')
    source = open_source(str(tmp_path / "*"))
    chunks = list(source.read(None))
    everything = ["a0", "a1", "a2", "a3", "a4", "a5", "a6", "b", "c0", "c1"]
    assert _values(source) == everything
    assert [len(chunk.values) for chunk in chunks] == [3, 3, 3, 1]
    assert [chunk.begin for chunk in chunks[1:]] == [chunk.end for chunk in chunks[:-1]]
    assert chunks[-1].progress == 1.0
    for number, chunk in enumerate(chunks):
        assert _values(source, chunk.begin) == everything[3 * number :]
        assert _values(source, json.loads(json.dumps(chunk.end))) == everything[3 * number + 3 :]


def test_long_documents_come_in_chunks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 10)
    source = open_source(_parquet(tmp_path / "a.parquet", ["x" * 25, "y", "z" * 9, "end"]))
    assert [len(chunk.values) for chunk in source.read(None)] == [1, 2, 1]


def test_globs_are_sorted_and_lists_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "bca":
        _write(tmp_path / f"{name}.txt", name.encode())
    _write(tmp_path / "[x].txt", b"brackets")
    assert _values(open_source("[a-c].txt")) == ["a", "b", "c"]
    assert _values(open_source(["c.txt", "[ab].txt"])) == ["c", "a", "b"]
    assert _values(open_source("[x].txt")) == ["brackets"]
    assert (open_source("a.txt").label, open_source("[a-c].txt").label) == ("a", "corpus")


def test_identity_changes_with_the_content_and_not_with_the_folder(tmp_path: Path) -> None:
    def identity(folder: str, content: bytes) -> dict[str, Any]:
        (tmp_path / folder).mkdir()
        return open_source(_write(tmp_path / folder / "a.txt", content)).identity()

    one = identity("one", b"text")
    assert one | {"sha256": ""} == {"source": "a.txt", "files": 1, "bytes": 4, "sha256": ""}
    assert identity("two", b"text") == one
    assert identity("three", b"texT")["sha256"] != one["sha256"]


def test_stdlib_is_this_python_s_own_library_without_its_tests() -> None:
    source = open_source("stdlib")
    assert isinstance(source, sources.FileSource)
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in source.paths]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py", "tokenize.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/")[:-1])]
    assert sum(path.stat().st_size for path in source.paths) > 8_000_000  # ≈ 12 MB in CPython 3.11 to 3.14
    assert source.identity()["python"].startswith("3.")
    first = next(iter(source.read(None)))
    assert first.values[0] == source.paths[0].read_bytes()


def test_manifests_name_sources_without_aliases_and_without_folders(tmp_path: Path) -> None:
    assert canonical("fineweb-edu") == ("HuggingFaceFW/fineweb-edu", "sample-10BT")
    assert canonical(["fineweb-edu"], "sample-100BT") == ("HuggingFaceFW/fineweb-edu", "sample-100BT")
    assert canonical("org/name") == ("org/name", None)
    assert canonical("stdlib") == ("stdlib", None)
    assert canonical("/home/her/corpus/*.jsonl") == ("*.jsonl", None)
    assert canonical(["/a/x.txt", "b/y.parquet"]) == (["x.txt", "y.parquet"], None)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'\n{"body": "x"}\n', r"a\.jsonl line 2 has no 'text': name one of body with --text_column"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl line 1 is not an object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl line 1 holds int under 'text', not text"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], r"a\.jsonl\.gz is damaged after line"),
        ("a.jsonl.gz", LINES, r"a\.jsonl\.gz is damaged after line 0"),
        ("a.jsonl.xz", lzma.compress(LINES)[:-9], r"a\.jsonl\.xz is damaged after line"),
        ("a.jsonl.xz", LINES, r"a\.jsonl\.xz is damaged after line 0"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is not a whole parquet file"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        _values(open_source(_write(tmp_path / name, content)))
    assert "\n" not in str(error.value)


def test_parquet_that_is_cut_or_has_no_text_is_refused(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "a.parquet", [str(i) * 100 for i in range(1000)], row_group_size=100)
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'body': name one of id, text as --text_column"):
        _values(open_source(path, text_column="body"))
    with pytest.raises(ValueError, match=r"a\.parquet holds int64 in column 'id', not text"):
        _values(open_source(path, text_column="id"))
    content = Path(path).read_bytes()
    for cut in (len(content) - 1, len(content) // 2):
        Path(path).write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"a\.parquet is not a whole parquet file"):
            _values(open_source(path))
    middle = len(content) // 2  # the footer is whole, the pages are not
    Path(path).write_bytes(content[:middle] + bytes(300) + content[middle + 300 :])
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole parquet file"):
        _values(open_source(path))


def test_sources_that_are_none_are_refused_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    _write(tmp_path / "a.doc", b"x")
    for source, reason in (
        ("gone.txt", r"there is no file gone\.txt: correct the path"),
        (["a.doc", "*.txt"], r"there is no file \*\.txt"),
        ("folder", r"folder is a folder: name its files, for example folder/\*\.jsonl"),
        ("a.doc", r"a\.doc is of a kind that cannot be read: sources end in \.txt"),
        ("fineweb", "'fineweb' is no source: give stdlib, fineweb-edu, ORG/NAME"),
        ("a/b/c", "'a/b/c' is no source"),
        (["org/name", "other/name"], "is no source"),
    ):
        with pytest.raises(ValueError, match=reason):
            open_source(source)
    with pytest.raises(ValueError, match="only datasets on the hub have a --name or a --revision"):
        open_source("stdlib", name="x")


def test_reading_stops_when_the_reader_does(tmp_path: Path) -> None:
    source = open_source(_parquet(tmp_path / "a.parquet", ["x" * (1 << 18)] * 100))
    before = threading.active_count()
    chunks = source.read(None)
    assert len(next(chunks).values) == 1
    assert threading.active_count() == before + 1
    assert isinstance(chunks, Iterator)
    chunks.close()  # type: ignore[attr-defined]
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


# -- the hub, its network in the test's hands --------------------------------------------------------------------------


class FakeDataset:
    """As much of `datasets.IterableDataset` as is used: three files of four rows, whose reading fails as planned."""

    num_shards = 3

    def __init__(self, failures: list[tuple[int, int, Exception]]) -> None:
        self.failures = failures  # (file, rows given before it fails, the error), used up in order
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


class Clock:
    """Time that passes only in sleep."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pauses: list[float] = []
        monkeypatch.setattr(time, "sleep", self.pauses.append)
        monkeypatch.setattr(time, "monotonic", lambda: sum(self.pauses))


def _hub(failures: list[tuple[int, int, Exception]], repo: str = "org/name") -> HubSource:
    return HubSource(repo, None, "c0ffee", "text", 12, FakeDataset(failures))


def _persist(source: HubSource, begin: Cursor | None = None) -> list[Chunk]:
    """The chunks without the reading thread, which waits by the clock that these tests stop."""
    return list(source._persist(begin or {"file": 0, "record": 0, "documents": 0}))


def _texts(chunks: list[Chunk]) -> list[str]:
    return [value.decode() for chunk in chunks for value in chunk.values if isinstance(value, bytes)]


def test_a_hub_dataset_can_be_gone_on_with_from_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_RECORDS", 5)
    chunks = _persist(_hub([]))
    assert _texts(chunks) == EVERYTHING
    assert [chunk.progress for chunk in chunks] == [5 / 12, 10 / 12, 1.0]
    assert [chunk.end["documents"] for chunk in chunks] == [5, 10, 12]
    for number, chunk in enumerate(chunks):
        assert _texts(_persist(_hub([]), chunk.end)) == EVERYTHING[5 * number + 5 :]


@pytest.mark.parametrize("chunk_records", [1, 3, 100])
def test_after_any_failure_no_document_is_missing_or_twice(monkeypatch: pytest.MonkeyPatch, chunk_records: int) -> None:
    monkeypatch.setattr(sources, "CHUNK_RECORDS", chunk_records)
    for file in range(3):
        for row in range(4):
            clock = Clock(monkeypatch)
            failures = [(file, row, ConnectionError("reset")), (file, row, TimeoutError("silence"))]
            assert _texts(_persist(_hub([*failures, (2, 3, pa.ArrowInvalid("cut"))]))) == EVERYTHING
            assert len(clock.pauses) == 3


def test_an_outage_is_sat_out_for_ten_minutes_and_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "CHUNK_RECORDS", 2)
    clock = Clock(monkeypatch)
    with pytest.raises(ValueError, match=r"org/name fails after document 6 \(unreachable\): run the same command"):
        _persist(_hub([(1, 3, ConnectionError("unreachable\nand more"))] * 1000))
    assert clock.pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert 600 <= sum(clock.pauses) <= 1200
    assert "org/name fails after document 6 (unreachable): trying again in 1 s" in capsys.readouterr().err


def test_patience_begins_anew_with_every_document_that_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK_RECORDS", 1)
    clock = Clock(monkeypatch)
    failures = [(file, row, ConnectionError("gone")) for file in range(3) for row in range(4) for _ in range(12)]
    assert _texts(_persist(_hub(failures))) == EVERYTHING
    assert sum(clock.pauses) > 1200


def test_data_that_stays_wrong_is_given_up_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(ValueError, match="org/name fails after document 0"):
        _persist(_hub([(0, 2, pa.ArrowInvalid("not parquet"))] * 1000))
    assert 0 < sum(clock.pauses) <= 60


def test_a_missing_column_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(ValueError, match="org/name has no column 'body': name one of text as --text_column"):
        _persist(HubSource("org/name", None, "c0ffee", "body", None, FakeDataset([])))
    assert clock.pauses == []


def test_only_fineweb_edu_holds_out_its_first_shard() -> None:
    assert (_hub([]).label, _hub([]).first_shard_is_val) == ("name", False)
    fineweb = _hub([], "HuggingFaceFW/fineweb-edu")
    assert (fineweb.label, fineweb.first_shard_is_val) == ("edufineweb", True)
