"""Tune glibc's allocator: weights on huge pages, freed blocks returned to the system.

With another C library, these functions do nothing.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# malloc.h, with glibc's initial values
M_TRIM_THRESHOLD, TRIM_THRESHOLD = -1, 128 << 10
M_MMAP_THRESHOLD = -3
M_MMAP_MAX, MMAP_MAX = -4, 1 << 16
M_ARENA_MAX = -8

MADV_HUGEPAGE = 14  # linux/mman.h
HUGE_PAGE = 2 << 20  # bytes, on x86-64


@contextmanager
def huge_pages(size: int) -> Iterator[None]:
    """Put about `size` bytes that are allocated inside the block on huge pages.

    A backend allocates each weight separately, in blocks too small or misaligned for huge pages.
    Inside, all blocks come from the top of the heap, for which huge pages are requested before it
    is first touched; joining small pages later would copy them all. A step then has fewer TLB
    misses. What is not used is returned to the system.

    This works on the main thread only, or on every thread after `one_heap`: other threads have
    heaps of their own. It does nothing if `size` is 0 or the kernel has huge pages disabled.
    Afterwards glibc no longer adjusts its thresholds by itself.
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
        libc.free(libc.malloc(TRIM_THRESHOLD - 1024))  # `free` trims the heap


def one_heap() -> None:
    """Make all threads share one heap that returns large blocks; for a server, before its threads.

    By default glibc has a heap per thread and keeps freed blocks of up to 32 MiB, so blocks of
    requests would lie between those of the backend.
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
