"""What goes wrong while a command runs: missing permissions, a full disk, Ctrl-C, a closed pipe, a hub that refuses.

Each ends with a message or an exit code of its own, nothing that was on disk is lost, and the same command resumes.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from example_folder import arguments, files
from processes import assert_same_run

from gpt2_lightning.__main__ import main
from gpt2_lightning.model import GPT
from gpt2_lightning.module import GPTModule

slow = pytest.mark.slow
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and permissions are POSIX")


def _assert_unchanged(before: dict[str, bytes]) -> None:
    after = files()
    assert {name: after.get(name) for name in before} == before


# -- permissions and full disks ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_root() -> Iterator[None]:
    """Takes from root the capabilities that let it ignore file permissions."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("only Linux lets root drop single capabilities")
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, sets) != 0:
        pytest.skip("root may not drop its capabilities here")
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0


@pytest.mark.usefixtures("folder")
@posix
@pytest.mark.parametrize(
    ("path", "mode", "line", "named"),
    [
        ("run/checkpoints", 0o555, "FIT --run_dir run --trainer.max_steps 9", "run/checkpoints"),
        ("run/checkpoints/last.ckpt", 0, "FIT --run_dir run", "last.ckpt"),
        ("shards/tiny_train_000001.npy", 0, "FIT", "tiny_train_000001.npy"),
        ("docs.jsonl", 0, "PREPARE --out out", "docs.jsonl"),
        ("folder", 0o555, "PREPARE --out folder/out", "folder/out"),
        ("bpe.ckpt", 0, "GENERATE", "bpe.ckpt"),
        ("examples.jsonl", 0, "HELLASWAG --examples examples.jsonl", "examples.jsonl"),
        ("folder", 0o555, "export tiny.ckpt folder/out", "folder"),
        ("folder", 0o555, "report run --out folder/out", "folder/out"),
    ],
)
def test_a_missing_permission_is_named_with_its_path(path, mode, line, named, capsys):
    before, known = files(), Path(path).stat().st_mode
    Path(path).chmod(mode)
    try:
        with _without_root():
            assert main(arguments(line)) == 1
    finally:
        Path(path).chmod(known)
    err = capsys.readouterr().err
    assert err.count(f"gpt2 {arguments(line)[0]}: error: ") == 1
    assert "Traceback" not in err
    assert named in err.splitlines()[-1]
    assert "Permission denied" in err.splitlines()[-1]
    _assert_unchanged(before)


@contextlib.contextmanager
def _no_file_beyond(size: int) -> Iterator[None]:
    """The kernel refuses each write that would make a file longer, as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("folder")
@posix
@pytest.mark.parametrize(
    ("line", "size", "named"),
    [
        pytest.param("PREPARE --out out", 900, "out", id="a shard"),
        pytest.param("FIT", 20, "", id="events"),
        pytest.param("FIT --run_dir run --trainer.max_steps 9", 60_000, "step_000009.ckpt", id="a checkpoint"),
        pytest.param("export tiny.ckpt out", 1_000, "out", id="an exported folder"),
        pytest.param("export bpe.ckpt out.bin --format llmc", 100_000, "", id="an exported file"),
    ],
)
def test_a_full_disk_leaves_what_was_saved_and_the_same_command_completes(line, size, named, capsys, read_scalars):
    before = {name: content for name, content in files().items() if name != "run/log.txt"}
    shutil.copytree("run", "whole")
    with _no_file_beyond(size):
        assert main(arguments(line)) == 1
    err = capsys.readouterr().err
    assert err.count(f"gpt2 {arguments(line)[0]}: error: ") == 1
    assert "Traceback" not in err
    assert named in err.splitlines()[-1]
    assert "free some space" in err.splitlines()[-1]
    _assert_unchanged(before)
    assert main(arguments(line)) == 0
    if "step" in named:
        assert main(arguments(f"{line} --run_dir whole")) == 0
        assert_same_run(Path("run"), Path("whole"), read_scalars, 9)


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _interrupt_at(owner: Any, name: str, call: int) -> Iterator[None]:
    """Sends this process a SIGINT when a function is called for the n-th time."""
    plain, calls, handler = getattr(owner, name), iter(range(1, 10**6)), signal.getsignal(signal.SIGINT)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        yield
    signal.signal(signal.SIGINT, handler)  # the Trainer leaves it ignored


@pytest.mark.usefixtures("folder")
@posix
@pytest.mark.parametrize(
    ("line", "owner", "name", "call"),
    [
        pytest.param("PREPARE --out out", os, "fsync", 3, id="prepare"),
        pytest.param("GENERATE", GPT, "hidden", 2, id="generate"),
        pytest.param("HELLASWAG --examples examples.jsonl", GPT, "hidden", 1, id="hellaswag"),
        pytest.param("export bpe.ckpt out.bin --format llmc", os, "replace", 1, id="export"),
    ],
)
def test_ctrl_c_ends_a_command_with_130_and_leaves_no_half_written_file(line, owner, name, call, capsys):
    before = files()
    with _interrupt_at(owner, name, call):
        assert main(arguments(line)) == 130
    out, err = capsys.readouterr()
    assert "interrupted" in err.splitlines()[-1]
    assert "Traceback" not in err
    if "--json" in arguments(line):
        assert out == ""
    _assert_unchanged(before)
    assert not [name for name in files() if name.endswith((".tmp", ".partial"))]
    assert main(arguments(line)) == 0
    if "out" in line.split():
        for path in Path("prepared").glob("*.npy"):
            assert (Path("out") / path.name).read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("folder")
@posix
@pytest.mark.parametrize(
    ("line", "owner", "name", "call"),
    [
        pytest.param("FIT_BPE --data.root out --data.source docs.jsonl", os, "fsync", 1, id="preparing", marks=slow),
        pytest.param("FIT", GPT, "hidden", 2, id="first validation"),
        pytest.param("FIT", GPTModule, "training_step", 6, id="step"),
        pytest.param("FIT", torch, "save", 1, id="checkpoint"),
    ],
)
def test_ctrl_c_at_any_stage_of_fit_changes_no_result(line, owner, name, call, capsys, read_scalars):
    before = files()
    with _interrupt_at(owner, name, call):
        assert main(arguments(line)) == 130
    assert "Traceback" not in capsys.readouterr().err
    _assert_unchanged(before)
    assert main(arguments(line)) == 0
    if line != "FIT":
        assert main(arguments(f"{line} --run_dir whole")) == 0
    assert_same_run(Path("new"), Path("run" if line == "FIT" else "whole"), read_scalars, 6)


# -- whole processes ---------------------------------------------------------------------------------------------------


def _process(line: str, home: Path, **options: Any) -> "subprocess.Popen[str]":
    environment = os.environ | {"HF_HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "gpt2_lightning", *arguments(line)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, env=environment, text=True, **pipes)


@pytest.mark.usefixtures("folder")
@slow
@pytest.mark.parametrize("line", ["FIT --data.root nowhere", "hellaswag absent.ckpt --json --examples builtin"])
def test_a_process_prints_nothing_but_its_error(line, tmp_path):
    out, err = (process := _process(line, tmp_path)).communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith(f"gpt2 {arguments(line)[0]}: error: ")
    assert err.count("\n") == 1
    assert out == "" or "--json" not in line


@pytest.mark.usefixtures("folder")
@posix
@slow
def test_a_closed_pipe_ends_a_command_silently_with_141(tmp_path):
    with _process("GENERATE --num_samples 1000", tmp_path) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.usefixtures("folder")
@slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
def test_output_that_cannot_be_written_is_an_error(tmp_path):
    with open("/dev/full", "w") as full, _process("PLAN", tmp_path, stdout=full) as process:
        err = process.stderr.read()
    assert process.returncode == 1
    assert "No space left on device" in err.splitlines()[-1]


# -- a hub that refuses ------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Answers each request with the status that the name of its repository stands for."""

    statuses: ClassVar = {"locked": 403, "gone": 404, "broken": 500, "hellaswag": 451}
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = next((status for name, status in self.statuses.items() if name in self.path), 404)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_POST = do_HEAD = do_GET


REFUSALS = {  # command line → exit code, and words of the one line on stderr
    "prepare --out out --source org/locked": (1, "org/locked", "403", "hf auth login"),
    "prepare --out out --source org/gone": (1, "org/gone", "--source"),
    "prepare --out out --source org/broken": (1, "org/broken", "500", "again"),
    "generate org/locked --prompt x": (1, "org/locked", "403", "hf auth login"),
    "export org/gone out": (1, "org/gone", "404"),
    "HELLASWAG": (0, "Rowan/hellaswag"),  # the built-in examples are scored instead
}
SERVE = """
import contextlib, io, json, sys
from gpt2_lightning.__main__ import main
for args in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(args)
    print(json.dumps([code, err.getvalue()]))
"""


@pytest.mark.usefixtures("folder")
@slow
@pytest.mark.parametrize("reachable", [True, False])
def test_a_hub_that_refuses_or_is_not_there_is_named_with_the_fix(reachable, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port if reachable else 9}"  # 9: nobody listens
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        input=json.dumps([arguments(line) for line in REFUSALS]),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    for (line, (code, name, *words)), answer in zip(REFUSALS.items(), done.stdout.splitlines(), strict=True):
        ended, err = json.loads(answer)
        assert ended == code, err
        assert err.count("\n") == 1, err
        for word in (name, *words) if reachable else (name,):
            assert word in err, line
