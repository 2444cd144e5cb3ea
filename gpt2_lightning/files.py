"""Atomic writing and locks, for files that several processes share."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under ``path`` complete or not at all: written beside it, synced, renamed.

    If the caller raises, the unfinished file is deleted. One writer per path at a time.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # left by a writer that was killed
    try:
        with temporary.open("xb") as file:  # x: never write through a link
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # makes the rename itself survive a power failure; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def try_lock(file: IO[bytes], of_process: bool) -> bool:
    """Lock an open file until it is closed or the process ends. Returns False if another process holds the lock.

    Args:
        file: opened for writing.
        of_process: the lock belongs to this process, not to children that it forks and that may outlive it; its threads
            share it. Otherwise the lock belongs to the open file, so that it also excludes other threads.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            (fcntl.lockf if of_process else fcntl.flock)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True
