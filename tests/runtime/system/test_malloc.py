"""Where the C library puts blocks, asked in a process of its own, since it lasts as long as that.

What is tested is what the kernel was asked for; whether it had huge pages to give is its affair.
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

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc keeps memory")

PRELUDE = """
import ctypes, threading
from pathlib import Path
from runtime.system.malloc import huge_pages, one_heap

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_size_t, [ctypes.c_ssize_t]

def flags(block):
    "What the kernel was asked of the memory at this address."
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name:
            first, end = (int(part, 16) for part in name.split("-"))
        elif name == "VmFlags:" and first <= block < end:
            return rest

def is_mapped():
    "Whether a block of 8 MB is mapped by itself, and so goes back when it is freed."
    block = libc.malloc(8 << 20)
    return block > libc.sbrk(0)
"""


def printed(code: str) -> list[str]:
    """What `code` prints, word by word, in a fresh Python."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not HUGE.exists(), reason="this kernel has no transparent huge pages")
def test_blocks_inside_are_asked_to_be_huge_and_others_are_not() -> None:
    found = printed("""
before = libc.malloc(8 << 20)
with huge_pages(32 << 20):
    inside = libc.malloc(20 << 20)
after = libc.malloc(8 << 20)
print(*("hg" in flags(block + (4 << 20)) for block in (before, inside, after)))
""")
    assert found == ["False", "True", "False"]


def test_quantized_weights_are_loaded_inside_and_floats_are_not(
    rounded_bundle: Path, plain_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    @contextmanager
    def recorded(size: int) -> Iterator[None]:
        with huge_pages(size):
            yield
        asked.append(size)

    monkeypatch.setattr("runtime.load.huge_pages", recorded)
    for path in (rounded_bundle, plain_bundle):
        load_session(path, open_bundle(path).manifest)
    assert asked[0] >= (rounded_bundle / "weights.safetensors").stat().st_size
    assert asked[1:] == [0]


def test_what_was_not_used_goes_back() -> None:
    found = printed("""
before = libc.sbrk(0)
with huge_pages(1 << 30):
    libc.malloc(8 << 20)
    during = libc.sbrk(0) - before
print(during >> 20, libc.sbrk(0) - before >> 20)
""")
    during, after = map(int, found)
    assert during >= 1024
    assert 8 <= after <= 10  # the block, and what `malloc` keeps at the top of its heap


def test_blocks_are_mapped_again_afterwards() -> None:
    assert printed("""
with huge_pages(32 << 20):
    print(is_mapped())
print(is_mapped())
""") == ["False", "True"]


@pytest.mark.skipif(not HUGE.exists(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize("shared", [False, True])
def test_a_thread_has_huge_pages_where_all_share_one_heap(shared: bool) -> None:
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


def test_large_blocks_go_back_to_the_system_in_a_server() -> None:
    assert printed("""
libc.free(libc.malloc(20 << 20))  # moves glibc's threshold up
print(is_mapped())
one_heap()
print(is_mapped())
""") == ["False", "True"]
