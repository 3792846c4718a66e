"""How the C library allocates: weights on huge pages, freed blocks given back. Knows only glibc.

Where there is another C library, nothing here does anything.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# malloc.h, with the values that glibc starts with
M_TRIM_THRESHOLD, TRIM_THRESHOLD = -1, 128 << 10
M_MMAP_THRESHOLD = -3
M_MMAP_MAX, MMAP_MAX = -4, 1 << 16
M_ARENA_MAX = -8

MADV_HUGEPAGE = 14  # linux/mman.h
HUGE_PAGE = 2 << 20  # bytes, on x86-64


@contextmanager
def huge_pages(size: int) -> Iterator[None]:
    """Have what is allocated inside lie on huge pages, as far as about `size` bytes go.

    A backend allocates each weight by itself, in blocks too small or too crooked for a huge page.
    Inside, all blocks come from the top of the heap, which is asked to be huge before it is first
    touched, since joining small pages afterwards copies all of them. A step then misses the
    processor's address cache less often. What was not used goes back.

    Only the main thread allocates from that heap, or every thread after `one_heap`; in others
    nothing changes, nor for a size of 0, nor where the kernel has huge pages switched off. glibc
    no longer moves its thresholds by itself afterwards.
    """
    libc = _glibc()
    if libc is None or not size:
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        block = libc.malloc(size + HUGE_PAGE) or 0
        in_heap = 0 < block < libc.sbrk(0)
        if in_heap:
            libc.madvise(-(-block // HUGE_PAGE) * HUGE_PAGE, size, MADV_HUGEPAGE)
        libc.free(block)
        if not in_heap:
            libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        libc.free(libc.malloc(TRIM_THRESHOLD - 1024))  # it is `free` that trims the heap


def one_heap() -> None:
    """For a server, before its threads: they share one heap, and it gives large blocks back.

    glibc has a heap for each thread otherwise, and keeps blocks of up to 32 MiB when they are
    freed, so that those of requests lie between those of the backend.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, 256 << 10)


@cache
def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_size_t, [ctypes.c_ssize_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
