"""How the C library handles memory that arrays have given back."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MAX_MMAP_THRESHOLD_BYTES = 32 << 20  # the most that glibc accepts
_TRIM_THRESHOLD_BYTES = 512 << 20


def keep_freed_memory() -> None:
    """Let this process keep freed blocks below 32 MiB for its next arrays instead of returning them to the system.

    By default glibc maps and unmaps arrays of a few hundred KiB each time, and every fresh page costs a fault: with 16
    sequences the temporaries of one decode step took longer to appear than to fill. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAX_MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
