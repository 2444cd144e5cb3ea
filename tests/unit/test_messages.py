"""Which exceptions become a message, and which keep their traceback."""

import errno
import signal

import pytest

from gpt2_lightning.cli.messages import exit_code, message_of
from gpt2_lightning.errors import UserError


def fails(error: BaseException):
    def run() -> None:
        raise error

    return run


def test_a_user_error_is_one_line_and_code_1(capsys):
    assert exit_code("fit", fails(UserError("no data:\n prepare it"))) == 1
    assert capsys.readouterr().err == "gpt2 fit: error: no data: prepare it\n"


@pytest.mark.parametrize("error", [ValueError("n"), KeyError("n"), OSError("n"), RuntimeError("n")])
def test_any_other_exception_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        exit_code("fit", fails(error))


def test_the_cause_of_a_librarys_exception_is_reported():
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = UserError("the cause")
    assert message_of(wrapped) == "the cause"


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.ckpt"), ["x.ckpt", "disk is full"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.yaml"), ["x.yaml: No such file"]),
        (MemoryError("Unable to allocate 3 TiB"), ["out of memory", "3 TiB"]),
        (RuntimeError("CUDA out of memory. Tried"), ["out of memory", "micro_batch_size"]),
        (RuntimeError("[x.cc:1] gloo: Connection closed by peer"), ["lost another process"]),
        (RuntimeError("gloo: Timed out waiting 10ms"), ["does not answer"]),
    ],
)
def test_what_the_system_says_becomes_a_message(error, parts):
    for part in parts:
        assert part in (message_of(error) or "")


def test_exit_codes(capsys):
    assert exit_code("fit", lambda: None) == 0
    assert exit_code("fit", fails(KeyboardInterrupt())) == 130
    assert exit_code("fit", fails(SystemExit(128 + signal.SIGTERM))) == 143
    assert "the same command resumes" in capsys.readouterr().err
