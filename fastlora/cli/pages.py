"""Memory that stays with the process, so that a timed step does not pay for its coming back."""

from __future__ import annotations

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1


@functools.cache
def keep_freed_pages() -> bool:
    """Tell glibc's malloc to keep what is freed, for the rest of the process; whether it does.

    By default it gives large tensors back to the system at once and takes new pages for the next
    ones. On a virtual machine whose host takes free pages away that costs more than a training
    step's arithmetic, and differs from one moment to the next.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
