"""A lock on a file that goes with its process, however that ends."""

import errno
import sys
from typing import IO


def try_lock(file: IO[bytes], of_process: bool) -> bool:
    """Takes an open file against others until it is closed; False where another has it.

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
