"""Make a process allocate at the same addresses every time. Knows nothing about TensorRT.

The order of some lists in a TensorRT plan follows heap addresses: one graph had six plans, which
listed its outputs in different orders. With both functions below, the plan no longer depends on the
Python modules imported before (torch among them), on environment variables, on the path of the
sources, or on whether Python had to compile them.
"""

import ctypes
import gc
import os

ADDR_NO_RANDOMIZE = 0x0040000  # personality(2)
QUERY_PERSONALITY = 0xFFFFFFFF  # personality(2): returns the current one and changes nothing

HEAP_ALIGNMENT = 1 << 28  # bytes; the heap is smaller when TensorRT starts: 10 MB
BLOCK_SIZES = (*(1 << bits for bits in range(16, 11, -1)), *range(2048, 8, -16))  # bytes


def fix_addresses(command: tuple[str, ...]) -> None:
    """Restart this process by `command` without address space randomization, if it has that.

    Side by side with randomization, one of 24 builds of one graph was different. Where the kernel
    refuses, the process continues with random addresses.
    """
    personality = ctypes.CDLL(None).personality
    current = personality(QUERY_PERSONALITY)
    if current == -1 or current & ADDR_NO_RANDOMIZE:
        return
    if personality(current | ADDR_NO_RANDOMIZE) != -1:
        os.execv(command[0], command)  # noqa: S606


def fix_heap() -> None:
    """Make malloc continue at an address that does not depend on its use so far.

    Moves the end of the heap to a multiple of HEAP_ALIGNMENT and fills the free blocks below, about
    1 MB, which stays allocated. Turns garbage collection off: it would free blocks again.
    """
    gc.collect()
    gc.disable()
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_ssize_t]
    end = libc.sbrk(0)
    start = -(-end // HEAP_ALIGNMENT) * HEAP_ALIGNMENT
    if libc.sbrk(start - end) != end:  # a limit on the data segment, or a C library without brk
        return
    for size in BLOCK_SIZES:  # large blocks first, so that few calls fill what is free
        while (libc.malloc(size) or start) < start:
            pass
