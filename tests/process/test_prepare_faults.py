"""`prepare` in processes of its own, against kill -9, a second process, and a hub that fails."""

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import COMMIT, FakeHub, fake_hub

from gpt2_lightning.data.prepare.write import prepare
from gpt2_lightning.data.shards import open_shard, read_manifest, verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX"),
]

PREPARE = "prepare(sys.argv[1], Path(sys.argv[2]), shard_tokens=20_000, workers=2, progress=False)"


def random_texts(count: int, words: int) -> list[str]:
    """Documents of random words: they compress little and tokenize into many different ids."""
    rng = random.Random(0)
    return [
        f"{i}: " + " ".join(f"{rng.getrandbits(24):x}" for _ in range(rng.randrange(2 * words))) for i in range(count)
    ]


def hashes(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir()}


def start(program: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    imports = "import sys; from pathlib import Path; from gpt2_lightning.data.prepare.write import prepare\n"
    return subprocess.Popen(
        [sys.executable, "-c", imports + program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """≈ 3.6 million tokens: 180 shards of 20,000."""
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in random_texts(6000, 150)))
    return path


def test_a_preparation_killed_ten_times_ends_with_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    prepare(str(corpus), tmp_path / "whole", shard_tokens=20_000, progress=False)
    expected = hashes(tmp_path / "whole")
    assert len(expected) > 40
    rng, out = random.Random(1), tmp_path / "out"
    shards: list[Path] = []
    for _ in range(10):
        process = start(PREPARE, corpus, out)
        known = len(shards)
        while len(shards) == known and process.poll() is None:  # until it works; from then on the moment is random
            shards = sorted(out.glob("*.npy"))
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        shards = sorted(out.glob("*.npy"))
    manifest = read_manifest(out)
    assert manifest is not None
    assert not manifest.complete
    assert start(PREPARE, corpus, out).communicate() == ("", "")
    assert hashes(out) == expected
    verify(out)


def test_a_second_process_waits_and_takes_over_when_the_first_is_killed(tmp_path: Path, corpus: Path) -> None:
    hold_lock = """
import time
from gpt2_lightning.data.prepare.write import lock_folder
with lock_folder(Path(sys.argv[2])):
    print("locked", flush=True)
    time.sleep(60)
"""
    out = tmp_path / "out"
    out.mkdir()
    first = start(hold_lock, corpus, out)
    assert first.stdout is not None
    assert first.stdout.readline() == "locked\n"
    second = start(PREPARE, corpus, out)
    assert second.stderr is not None
    assert second.stderr.readline() == f"another process is preparing {out}: waiting for it to end\n"
    assert hashes(out).keys() == {".lock"}
    first.kill()
    first.communicate()
    second.communicate()
    assert second.returncode == 0
    verify(out)


# -- the hub -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with the dataset org/name: 3 files of 400 documents. The folder ``expected`` holds their shards."""
    texts = random_texts(1200, 60)
    files = {"README.md": b"---\nlicense: mit\n---\n"}
    for number in range(3):
        buffer = io.BytesIO()
        table = pa.table({"id": range(400), "text": texts[400 * number : 400 * (number + 1)]})
        pq.write_table(table, buffer, row_group_size=50, compression="none", use_dictionary=False)
        files[f"data/train-{number:05d}-of-00003.parquet"] = buffer.getvalue()
    pq.write_table(pa.table({"text": texts}), tmp_path / "name.parquet")
    prepare(str(tmp_path / "name.parquet"), tmp_path / "expected", shard_tokens=20_000, progress=False)
    with fake_hub(files) as hub:
        yield hub


# short pauses; small chunks, so that there are many positions to resume from
SETTINGS = """
import datasets
from gpt2_lightning.data.prepare import sources
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0.05
sources.FIRST_PAUSE, sources.CHUNK_DOCUMENTS = 0.05, 20
"""


def start_with_hub(hub: FakeHub, out: Path, program: str = PREPARE) -> "subprocess.Popen[str]":
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    return start(SETTINGS + program, "org/name", out, HF_HOME=str(out.parent / "home"), **environment)


@pytest.mark.parametrize(
    ("faults", "kill"),
    [
        (["", "stall", "", "", "stall"], False),
        (["", "truncate", "truncate", "", "drop", "", "unavailable", "", "drop"], False),
        (["", "drop", "", "truncate"], True),
    ],
)
def test_a_hub_that_fails_loses_no_document_and_repeats_none(
    tmp_path: Path, hub: FakeHub, faults: list[str], kill: bool
) -> None:
    out = tmp_path / "out"
    hub.faults[:] = faults
    if kill:
        process = start_with_hub(hub, out)
        while len(list(out.glob("*train*.npy"))) < 2:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    process = start_with_hub(hub, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert hub.seen_faults == [fault for fault in faults if fault]
    expected = sorted((tmp_path / "expected").glob("*.npy"))
    assert [path.name for path in sorted(out.glob("*.npy"))] == [path.name for path in expected]
    for path in expected:
        assert open_shard(out / path.name).tolist() == open_shard(path).tolist()
    manifest = verify(out)
    assert manifest.documents == {"kept": 1200, "null": 0, "empty": 0, "replaced": 0}
    assert manifest.source == {"source": "org/name", "name": None, "revision": COMMIT}


def test_what_the_hub_does_not_have_is_a_short_message(tmp_path: Path, hub: FakeHub) -> None:
    hub.statuses["org/busy"] = 429
    program = """
for options in ({"source": "org/gone"}, {"source": "org/busy"}, {"revision": "v9"}, {"name": "big"},
                {"text_column": "body"}):
    try:
        prepare(**{"source": "org/name", "out": Path(sys.argv[2]), "progress": False} | options)
    except ValueError as error:
        print(error)
"""
    gone, busy, *others = start_with_hub(hub, tmp_path / "out", program).communicate()[0].splitlines()
    assert gone.startswith("the hub has no dataset org/gone that you may read: correct --source, or log in")
    assert busy.startswith("the hub does not give org/busy (429")
    assert others == [
        "org/name has no revision v9: choose another --revision",
        "org/name cannot be opened (BuilderConfig 'big' not found. Available: ['default']): correct --source or --name",
        "org/name has no column 'body': set --text_column to one of id, text",
    ]


def test_no_network_is_a_short_message(tmp_path: Path) -> None:
    program = "try: prepare(sys.argv[1], Path(sys.argv[2]))\nexcept ValueError as error: print(error)"
    process = start(program, "org/name", tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    message = process.communicate()[0]
    assert message.startswith("the hub cannot be reached for org/name (")
    assert message.endswith("): check the network, or use local files\n")
    assert message.count("\n") == 1
