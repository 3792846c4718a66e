"""Huge pages and heaps of the C library. Each test uses a new process: settings outlast a test.

The tests check what the kernel was asked for, not whether it had huge pages to give.
"""

import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runtime.bundle.open import open_bundle
from runtime.load import load_session
from runtime.system.malloc import huge_pages

ROOT = Path(__file__).resolve().parents[3]
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

PRELUDE = """
import ctypes, threading
from pathlib import Path
from runtime.system.malloc import huge_pages, one_heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_size_t, [ctypes.c_ssize_t]

def flags(block):
    "The flags that the kernel has for the memory at this address."
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name:
            first, end = (int(part, 16) for part in name.split("-"))
        elif name == "VmFlags:" and first <= block < end:
            return rest

def is_mapped():
    "Whether a block of 8 MB has its own mapping, which is unmapped when it is freed."
    block = libc.malloc(8 << 20)
    return block > libc.sbrk(0)
"""


def printed(code: str) -> list[str]:
    """The words that `code` prints in a new Python process."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not HUGE.exists(), reason="this kernel has no transparent huge pages")
def test_huge_pages_are_requested_for_blocks_inside_only() -> None:
    found = printed("""
before = libc.malloc(8 << 20)
with huge_pages(32 << 20):
    inside = libc.malloc(20 << 20)
after = libc.malloc(8 << 20)
print(*("hg" in flags(block + (4 << 20)) for block in (before, inside, after)))
""")
    assert found == ["False", "True", "False"]


def test_huge_pages_are_used_for_quantized_weights_only(
    rounded_bundle: Path, plain_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    @contextmanager
    def recorded(size: int) -> Iterator[None]:
        with huge_pages(size):
            yield
        sizes.append(size)

    monkeypatch.setattr("runtime.backends.onnxruntime_cpu.huge_pages", recorded)
    for path in (rounded_bundle, plain_bundle):
        manifest = open_bundle(path).manifest
        load_session(path, manifest.build, manifest.files)
    assert sizes[0] >= (rounded_bundle / "weights.safetensors").stat().st_size
    assert sizes[1:] == [0]


def test_unused_memory_is_returned() -> None:
    found = printed("""
before = libc.sbrk(0)
with huge_pages(1 << 30):
    libc.malloc(8 << 20)
    during = libc.sbrk(0) - before
print(during >> 20, libc.sbrk(0) - before >> 20)
""")
    during, after = map(int, found)
    assert during >= 1024
    assert 8 <= after <= 10  # the block, and what `malloc` keeps at the top of the heap


def test_large_blocks_get_their_own_mapping_again_afterwards() -> None:
    assert printed("""
with huge_pages(32 << 20):
    print(is_mapped())
print(is_mapped())
""") == ["False", "True"]


@pytest.mark.skipif(not HUGE.exists(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize("shared", [False, True])
def test_a_thread_gets_huge_pages_only_if_all_share_one_heap(shared: bool) -> None:
    found = printed(f"""
if {shared}:
    one_heap()
def work():
    with huge_pages(32 << 20):
        print("hg" in flags(libc.malloc(20 << 20) + (4 << 20)))
thread = threading.Thread(target=work)
thread.start()
thread.join()
""")
    assert found == [str(shared)]


def test_with_one_heap_large_blocks_are_returned_to_the_system() -> None:
    assert printed("""
libc.free(libc.malloc(20 << 20))  # raises glibc's threshold for mapping
print(is_mapped())
one_heap()
print(is_mapped())
""") == ["False", "True"]
