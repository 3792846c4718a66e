"""Make a process allocate at the same addresses every time. Knows nothing about TensorRT.

The order of some lists in a TensorRT plan follows heap addresses: one graph had six plans, which
listed its outputs in different orders. With both functions below, the plan no longer depends on the
Python modules imported before (torch among them), on environment variables, on the path of the
sources, or on whether Python had to compile them.
"""

import ctypes
import gc
import os
from contextlib import suppress

ADDR_NO_RANDOMIZE = 0x0040000  # personality(2)
QUERY_PERSONALITY = 0xFFFFFFFF  # personality(2): returns the current one and changes nothing

HEAP_ALIGNMENT = 1 << 28  # bytes; the heap is smaller when TensorRT starts: 10 MB
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
LARGE = 1 << 25  # bytes from which malloc maps a block: glibc's own largest value
BLOCK_SIZES = (*(1 << bits for bits in range(16, 11, -1)), *range(2048, 8, -16))  # bytes


def fix_addresses(command: tuple[str, ...]) -> None:
    """Restart this process by `command` on one core and without random addresses, if it has them.

    With random addresses, one of 24 builds of one graph was different. TensorRT also starts threads
    in pairs, one for each core: with two profiles, 5 of 16 builds were different, because blocks
    that one thread frees are the next that another gets. On one core, and scheduled as a batch job,
    the threads take turns, and 32 of 32 builds were equal on a busy host; with four times as many
    processes as cores, about one in thirty still differed. A build takes no longer, since nearly
    all of it is in one thread. Where the kernel refuses, the process continues as it is.
    """
    personality = ctypes.CDLL(None).personality
    current = personality(QUERY_PERSONALITY)
    if current == -1 or current & ADDR_NO_RANDOMIZE:
        return
    with suppress(OSError):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})  # builds at once: several cores
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if personality(current | ADDR_NO_RANDOMIZE) != -1:
        os.execv(command[0], command)  # noqa: S606


def fix_heap() -> None:
    """Make malloc continue at an address that does not depend on its use so far.

    Moves the end of the heap to a multiple of HEAP_ALIGNMENT and fills the free blocks below, about
    1 MB, which stays allocated. Turns garbage collection off: it would free blocks again. Which
    blocks are mapped is fixed, too: glibc raises that size whenever a larger one is freed, so it
    depended on the largest module that Python had read.
    """
    gc.collect()
    gc.disable()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(option, LARGE)
    end = libc.sbrk(0)
    start = -(-end // HEAP_ALIGNMENT) * HEAP_ALIGNMENT
    if libc.sbrk(start - end) != end:  # a limit on the data segment, or a C library without brk
        return
    for size in BLOCK_SIZES:  # large blocks first, so that few calls fill what is free
        while (libc.malloc(size) or start) < start:
            pass
