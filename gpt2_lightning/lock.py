"""A lock on a file that goes with its process, however that ends."""

import errno
import sys
from typing import IO


def try_lock(file: IO[bytes]) -> bool:
    """Takes an open file against other processes until it is closed; False where another has it.

    On POSIX it is a record lock, which forked processes do not inherit: a reader process that outlives a killed run by
    seconds does not hold it.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True
