"""Preparation in processes of its own, against kill -9, a full disk, a second process, and a hub that misbehaves."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2_lightning.data.prepare.write import prepare
from gpt2_lightning.data.shards import open_shard, read_manifest, verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and RLIMIT_FSIZE are POSIX"),
]


def _texts(count: int, words: int) -> list[str]:
    """Documents of random words: they compress little and tokenize into many different ids."""
    rng = random.Random(0)
    return [
        f"{i}: " + " ".join(f"{rng.getrandbits(24):x}" for _ in range(rng.randrange(2 * words))) for i in range(count)
    ]


def _files(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def _start(program: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    program = "import sys; from pathlib import Path; from gpt2_lightning.data.prepare.write import prepare\n" + program
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


PREPARE = "prepare(sys.argv[1], Path(sys.argv[2]), shard_tokens=20_000, workers=2, progress=False)"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """≈ 1.2 million tokens: 60 shards of 20,000."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in _texts(2000, 150)))
    return path


def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    prepare(str(corpus), tmp_path / "whole", shard_tokens=20_000, progress=False)
    whole = _files(tmp_path / "whole")
    assert len(whole) > 40
    rng = random.Random(1)
    shards = []
    for _ in range(10):
        process = _start(PREPARE, corpus, tmp_path / "out")
        known = len(shards)
        while len(shards) == known and process.poll() is None:  # it is at work: the moment from here on is random
            shards = sorted((tmp_path / "out").glob("*.npy"))
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was too fast to be killed"
        shards = sorted((tmp_path / "out").glob("*.npy"))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert not manifest.complete
    process = _start(PREPARE, corpus, tmp_path / "out")
    assert process.communicate() == ("", "")
    assert _files(tmp_path / "out") == whole
    verify(tmp_path / "out")


def test_a_disk_that_fills_up_half_way_costs_no_finished_shard(tmp_path: Path, corpus: Path) -> None:
    prepare(str(corpus), tmp_path / "whole", shard_tokens=20_000, progress=False)
    whole = _files(tmp_path / "whole")
    program = f"""
import resource
from gpt2_lightning.data.prepare import write as module
write, written = module.write_shard, []
def limited(path, tokens):
    written.append(path)
    if len(written) == 7:  # no file may now grow beyond 10 kB: the kernel stops the write half-way
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    return write(path, tokens)
module.write_shard = limited
try:
    {PREPARE}
except ValueError as error:
    print(error)
"""
    process = _start(program, corpus, tmp_path / "out")
    said, errors = process.communicate()
    assert errors == ""
    assert said == (
        f"{tmp_path / 'out'} cannot be written (File too large): make room and run the same command again: "
        "the finished shards are intact, and it goes on after them\n"
    )
    finished = {name: digest for name, digest in _files(tmp_path / "out").items() if name.endswith(".npy")}
    assert len(finished) == 6
    assert finished.items() <= whole.items()
    process = _start(PREPARE, corpus, tmp_path / "out")
    assert process.communicate() == ("", "")
    assert _files(tmp_path / "out") == whole


def test_a_second_process_waits_and_takes_over_if_the_first_dies(tmp_path: Path, corpus: Path) -> None:
    prepare(str(corpus), tmp_path / "whole", shard_tokens=20_000, progress=False)
    holding = """
import time
from gpt2_lightning.data.prepare.write import _lock
with _lock(Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""
    (tmp_path / "out").mkdir()
    first = _start(holding, corpus, tmp_path / "out")
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    second = _start(PREPARE, corpus, tmp_path / "out")
    assert second.stderr is not None
    assert second.stderr.readline() == f"another process is preparing {tmp_path / 'out'}: waiting for it to end\n"
    assert _files(tmp_path / "out").keys() == {".lock"}
    first.kill()
    first.communicate()
    second.communicate()
    assert second.returncode == 0
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")


# -- a hub on loopback -------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that streaming a dataset needs; answers that carry data can go wrong."""

    protocol_version = "HTTP/1.1"
    files: ClassVar[dict[str, bytes]] = {}
    faults: ClassVar[list[str]] = []
    """What goes wrong with the next answers that carry data, one after the other."""
    happened: ClassVar[list[str]] = []

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(self.path.split("?")[0])
        api = "/api/datasets/org/name"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            names = [{"rfilename": name} for name in self.files]
            self._json({"id": "org/name", "sha": COMMIT, "private": False, "siblings": names})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self._json(self._entries(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/")))
        elif path.startswith(f"{api}/paths-info/"):
            self._json([entry for name in json.loads(body)["paths"] for entry in self._entries(name, itself=True)])
        elif path.startswith(f"/datasets/org/name/resolve/{COMMIT}/") and path.split("/", 6)[6] in self.files:
            self._file(self.files[path.split("/", 6)[6]])
        else:
            code = (
                "RevisionNotFound"
                if "/revision/" in path
                else "EntryNotFound"
                if "/resolve/" in path
                else "RepoNotFound"
            )
            self._head(404, 0, {"X-Error-Code": code})

    do_POST = do_HEAD = do_GET

    def _entries(self, folder: str, itself: bool = False) -> list[dict[str, Any]]:
        """What lies directly in a folder, or under that very name."""
        entries = {}
        for name, content in self.files.items():
            parts = name.split("/")
            depth = len(folder.split("/")) if folder else 0
            shown = "/".join(parts[: depth + (not itself)])
            if name == folder or name.startswith(f"{folder}/") or not folder:
                kind = {"type": "file", "size": len(content)} if shown == name else {"type": "directory"}
                entries[shown] = {"path": shown, "oid": hashlib.sha1(content).hexdigest(), **kind}
        return list(entries.values())

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self._head(200, len(content), {"Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(content)

    def _file(self, content: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD" or "Range" not in self.headers:
            self._head(200, len(content), headers)
            if self.command != "HEAD":
                self.wfile.write(content)
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last or len(content)) + 1]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        fault = self.faults.pop(0) if self.faults else ""
        if fault:
            self.happened.append(fault)
        if fault == "unavailable":
            self._head(503, 0, {})
        elif fault == "truncate":  # an answer that claims to be whole and is not
            self._head(206, len(part) // 2, headers)
            self.wfile.write(part[: len(part) // 2])
        else:
            self._head(206, len(part), headers)
            self.wfile.write(part[: len(part) // 2] if fault else part)
            if fault == "stall":
                time.sleep(4)
            self.close_connection = bool(fault)  # in the middle of an answer: "drop"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a hub with the dataset org/name: 3 files of 400 documents."""
    texts = _texts(1200, 60)
    Hub.files, Hub.faults, Hub.happened = {"README.md": b"---\nlicense: mit\n---\n"}, [], []
    for number in range(3):
        buffer = io.BytesIO()
        table = pa.table({"id": range(400), "text": texts[400 * number : 400 * (number + 1)]})
        pq.write_table(table, buffer, row_group_size=50, compression="none", use_dictionary=False)
        Hub.files[f"data/train-{number:05d}-of-00003.parquet"] = buffer.getvalue()
    local = tmp_path / "name.parquet"
    pq.write_table(pa.table({"text": texts}), local)
    prepare(str(local), tmp_path / "expected", shard_tokens=20_000, progress=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# pauses as short as a test needs them; small chunks and blocks, so that there is much to go on from
HASTE = """
import datasets
from gpt2_lightning.data.prepare import sources
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0.05
sources.FIRST_PAUSE, sources.CHUNK_RECORDS = 0.05, 20
"""


def _stream(hub: str, out: Path, program: str = PREPARE) -> "subprocess.Popen[str]":
    home = out.parent / "home"
    return _start(
        HASTE + program,
        "org/name",
        out,
        HF_ENDPOINT=hub,
        HF_HOME=str(home),
        HF_HUB_OFFLINE="0",
        HF_HUB_DOWNLOAD_TIMEOUT="1",
    )


def _assert_expected(out: Path) -> None:
    """The shards that the same documents give from a local file."""
    expected = sorted((out.parent / "expected").glob("*.npy"))
    assert [path.name for path in sorted(out.glob("*.npy"))] == [path.name for path in expected]
    for path in expected:
        assert open_shard(out / path.name).tolist() == open_shard(path).tolist()
    manifest = verify(out)
    assert manifest.documents == {"kept": 1200, "null": 0, "empty": 0, "replaced": 0}
    assert manifest.source == {"source": "org/name", "name": None, "revision": COMMIT}


@pytest.mark.parametrize(
    "faults",
    [
        ["", "stall", "", "", "stall"],
        ["", "truncate", "truncate", "", "drop", "", "unavailable", "", "drop"],
    ],
    ids=["stalls", "drops and truncates"],
)
def test_a_hub_that_misbehaves_costs_no_document_and_doubles_none(tmp_path: Path, hub: str, faults: list[str]) -> None:
    Hub.faults[:] = faults
    process = _stream(hub, tmp_path / "out")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert Hub.happened == [fault for fault in faults if fault]
    _assert_expected(tmp_path / "out")


def test_killed_while_the_hub_misbehaves_it_goes_on_without_a_gap(tmp_path: Path, hub: str) -> None:
    Hub.faults[:] = ["", "drop", "", "truncate"]
    process = _stream(hub, tmp_path / "out")
    while len(list((tmp_path / "out").glob("*train*.npy"))) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was too fast to be killed"
    process = _stream(hub, tmp_path / "out")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    _assert_expected(tmp_path / "out")


def test_what_the_hub_does_not_have_is_one_sentence(tmp_path: Path, hub: str) -> None:
    program = """
for options in ({"source": "org/gone"}, {"revision": "v9"}, {"name": "big"}, {"text_column": "body"}):
    try:
        prepare(**{"source": "org/name", "out": Path(sys.argv[2]), "progress": False} | options)
    except ValueError as error:
        print(error)
"""
    said = _stream(hub, tmp_path / "out", program).communicate()[0].splitlines()
    assert said == [
        "the hub has no dataset org/gone that you may read: correct --source, or log in",
        "org/name has no revision v9: name another as --revision",
        "org/name cannot be opened (BuilderConfig 'big' not found. Available: ['default']): correct --source or --name",
        "org/name has no column 'body': name one of id, text as --text_column",
    ]


def test_no_network_is_one_sentence(tmp_path: Path) -> None:
    program = "try: prepare(sys.argv[1], Path(sys.argv[2]))\nexcept ValueError as error: print(error)"
    process = _start(program, "org/name", tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    said = process.communicate()[0]
    assert said.startswith("the hub cannot be reached for org/name (")
    assert said.endswith("): check the network, or name local files as --source\n")
    assert said.count("\n") == 1
