"""What a user is told when a command fails: one sentence, or the traceback of what is a defect of ours."""

import errno
import os
import sys
import time

from gpt2_lightning.errors import UserError

LAUNCHERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PL_GLOBAL_SEED"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NNODES"),
)
"""Variables that torchrun, Lightning and SLURM set, each to a number."""


def stdout_closed() -> bool:
    """Whether the reader of standard output has gone, as `head` does: an end, which shells count as 141, no error."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains when it ends
        return True
    return False


def rank0_reported() -> bool:
    """Whether rank 0 speaks for this process: given a moment, it will have ended over the same error."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return False
    parent = os.getppid()  # rank 0 under Lightning's launcher; torchrun's agent ends this process when rank 0 has ended
    time.sleep(3)
    return os.getppid() != parent


def message_of(error: BaseException | None) -> str | None:
    """What to tell a user; None for what is a defect of ours, which keeps its traceback."""
    while error is not None:
        if isinstance(error, UnicodeDecodeError):
            return f"a file that should be UTF-8 text is not ({error.reason} at byte {error.start}): save it as UTF-8"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"the disk is full ({error.filename or error.strerror}): make room, and run the same command again"
        if isinstance(error, OSError) and error.filename is not None:
            not_allowed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            mend = (
                "give this user the right to, or name another" if not_allowed else "correct the path, or name another"
            )
            return f"{error.filename}: {error.strerror}: {mend}"
        if isinstance(error, UserError) or type(error).__name__ == "MisconfigurationException":
            return " ".join(str(error).split())
        if type(error).__name__.startswith("Dist") or "gloo" in str(error):
            return _of_several_processes(str(error).splitlines()[0])
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # of numpy, and of torch on a CPU
            asked = str(error).partition("DefaultCPUAllocator: ")[2].partition(". Error code")[0] or str(error)
            return (
                f"this machine has too little memory ({asked}): lower what asks for it, such as model.config, "
                "data.micro_batch_size or --shard_tokens"
            )
        if "out of memory" in str(error):
            return (
                f"the device is out of memory ({str(error).splitlines()[0]}): lower data.micro_batch_size or set it to "
                "auto, the steps stay the same"
            )
        error = error.__cause__  # what a library wraps into an error of its own
    return None


def _of_several_processes(said: str) -> str:
    """What to tell of an error between the processes of a job, from the first line that torch said about it."""
    reason = said.rpartition("] ")[2].partition(" This is typically")[0].rstrip(".")  # gloo begins with its source line
    if "EADDRINUSE" in said:
        taken = said.partition("port: ")[2].partition(",")[0]
        return (
            f"port {taken} of this machine is in use, perhaps by another job: give all nodes another MASTER_PORT "
            "(torchrun: --master_port)"
        )
    if "clients joined" in said or "trying to connect" in said:
        return (
            f"the nodes of this job did not meet ({reason}): start the same command on each, with MASTER_ADDR and "
            "MASTER_PORT of node 0, and see that no firewall is between them"
        )
    again = "start the same command again on every node"
    if "imed out" in said:
        return f"another process of this job hangs ({reason}): end it, and {again}"
    return f"lost another process of this job ({reason}): see what it said, and {again}"


def refuse_odd_launcher() -> None:
    """Before Lightning is imported, which reads these variables as numbers.

    Raises:
        ValueError: one of them is none.
    """
    for name in LAUNCHERS:
        if not os.environ.get(name, "0").isdecimal():
            raise ValueError(
                f"the environment variable {name} is {os.environ[name]!r}, where a launcher sets a number: run `unset "
                f"{name}` first, or start this with torchrun"
            )
