"""Files that several processes share: written whole or not at all, and locked by who is at work."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under ``path`` whole or not at all: written beside it, synced, then renamed over it.

    On any error the half-written file is removed, which also gives its space back. One writer per path at a time.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a writer that was killed
    try:
        with temporary.open("xb") as file:  # never through a link that somebody laid there
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself must survive a power cut; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def try_lock(file: IO[bytes], of_process: bool) -> bool:
    """Locks an open file against others until it is closed or its process ends; False where another has it.

    Args:
        of_process: the process holds it, so that forked children, which may outlive it by seconds, do not, and its
            threads share it; else the open file itself does, against threads as well.
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
