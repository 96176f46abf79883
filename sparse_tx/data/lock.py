"""One process at a time: a lock on a file, given back by the system even if its holder is killed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[bool]:
    """Holds `path` alone while the block runs, waiting for another holder. Yields whether the lock is real.

    Where the file system or the platform has no such lock the block runs all the same: what it protects is
    put in place by one atomic rename, so two at once cost work and never a wrong result.
    """
    with path.open("a") as file:
        yield _lock(file, what)  # closing the file lets go


def _lock(file, what: str) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process: {what}", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Yields at once whether this process has `path` for itself while the block runs, or another one has it."""
    with path.open("a") as file:
        mine = True
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                mine = False
            except OSError:
                pass  # no locks on this file system
        yield mine
