"""Exceptions to messages and exit codes: what a user sees when a command fails."""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable

from gpt2_lightning.errors import UserError


def exit_code(command: str, run: Callable[[], None]) -> int:
    """Call ``run``, print what a user can fix as one message, and return the exit code of ``gpt2 <command>``.

    An exception that is a defect of ours, or comes from the user's own code, keeps its traceback.
    """
    try:
        run()
        sys.stdout.flush()  # a full disk or a closed pipe must show here, not when the interpreter ends
    except (SystemExit, KeyboardInterrupt) as stop:
        # Lightning's Trainer turns Ctrl-C into SystemExit(1)
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        resume = "; the same command resumes" if command in ("fit", "prepare") else ""
        print(f"gpt2 {command}: interrupted{resume}", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and stdout_closed():
            return 141
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all workers when one fails: print first
        message = message_of(error)
        if message is None:
            raise
        if not rank0_reported():
            print(f"gpt2 {command}: error: {message}", file=sys.stderr)
        return 1
    return 0


def stdout_closed() -> bool:
    """Whether the reader of stdout has gone, as `head` does after its last line; shells report this as 141."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return True
    return False


def rank0_reported() -> bool:
    """Whether rank 0 has reported the same error: it has ended, so this process has a new parent."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    parent = os.getppid()  # rank 0 with Lightning's launcher; with torchrun the agent, which ends this process
    time.sleep(3)
    return os.getppid() != parent


def message_of(error: BaseException | None) -> str | None:
    """The message for an exception that the user can do something about, or None."""
    while error is not None:
        first_line = (str(error).splitlines() or [""])[0]
        if isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException":  # Lightning's UserError
            return " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"the disk is full ({error.filename or error.strerror}): free some space and run the same command again"
            )
        if isinstance(error, OSError) and error.filename is not None:
            return f"{error.filename}: {error.strerror}"
        if type(error).__module__.startswith("torch.distributed") or re.search(r"\bgloo\b", str(error)):
            return _distributed_message(first_line)
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
            return (
                f"out of memory ({first_line}): lower data.micro_batch_size or set it to auto (the steps stay the "
                "same), or lower model.config or --shard_tokens"
            )
        error = error.__cause__
    return None


def _distributed_message(text: str) -> str:
    """For an error of torch.distributed, from its first line."""
    reason = text.rpartition("] ")[2].partition(" This is typically")[0].rstrip(".")  # gloo puts its source line first
    if "EADDRINUSE" in text:
        return f"the port of node 0 is in use ({reason}): give all nodes another MASTER_PORT (torchrun: --master_port)"
    if "clients joined" in text or "trying to connect" in text:
        return (
            f"the nodes did not connect ({reason}): start the same command on each node, with MASTER_ADDR and "
            "MASTER_PORT of node 0, and check that no firewall is between them"
        )
    fix = "start the same command again on every node"
    if "imed out" in text:
        return f"another process of this job does not answer ({reason}): end it, then {fix}"
    return f"lost another process of this job ({reason}): see its output, then {fix}"
