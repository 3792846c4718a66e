"""ONNX Runtime: the ring is updated in place, decoding allocates nothing, errors are ours.

What ONNX Runtime says on standard error, and what a process takes in memory, is seen from outside:
those tests run a small program of their own, in which torch is never imported.
"""

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from graphs.errors import MistralcError
from graphs.spec import RingSpec
from runtime.backends.onnxruntime_cpu import KEPT_BINDINGS, NO_FLASH, OrtSession
from runtime.decoding.ring import Ring
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

ROOT = Path(__file__).resolve().parents[3]
SPEC = tiny_spec(vocab_size=64, layer_windows=(4, 16))  # its trace is shared with other tests
RING = RingSpec(chunk=3, context=1)

# Loads argv[1], a model of the spec in argv[2], and gives `session` and `ring`.
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from graphs.spec import ModelSpec, RingSpec
from runtime.decoding.generator import Generator
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import SamplingParams
from runtime.backends.onnxruntime_cpu import OrtSession

spec = ModelSpec.from_json(json.loads(sys.argv[2]))
session = OrtSession(Path(sys.argv[1]), spec)
ring = Ring(spec, RingSpec(chunk=3, context=1))
"""

GENERATE = """
generator = Generator(session, ring, spec.vocab_size)
logits = generator.feed(list(range(50)))
tokens = list(generator.generate(logits, SamplingParams(temperature=0), max_new_tokens=100))
assert len(tokens) == 100
"""

SEPARATE = """
import onnxruntime as ort
session.resize(ring.full)
for name, cache in session._caches.items():
    other = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(cache))
    session._decode_step(slice(0, 1)).binding.bind_ortvalue_output("present_" + name, other)
one = np.zeros((1, 1), np.int64)
session.step(one, one, one)
"""

MEASURE = """
import os
from pathlib import Path

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

generator = Generator(session, ring, spec.vocab_size)
steps = generator.generate(generator.feed([1, 2, 3]), SamplingParams(temperature=0))
for _ in range(500):
    next(steps)
before = resident()
for _ in range(3000):
    next(steps)
print(resident() - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "model.onnx"
    path.write_bytes(tiny.model_bytes(SPEC, "cpu"))
    return path


def run(
    model: Path, program: str, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    arguments = [str(model), json.dumps(SPEC.to_json())]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM + program, *arguments],
        env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip


# In place


def test_onnx_runtime_has_nothing_to_warn_of_at_its_default_log_level(model: Path):
    assert run(model, GENERATE).stderr == ""


def test_onnx_runtime_leaves_nothing_in_the_users_cache(model: Path, tmp_path: Path):
    # Not even CI may be in the environment: it leaves nothing there anyway.
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    run(model, GENERATE, environment)
    assert list(tmp_path.iterdir()) == []
    run(model, GENERATE, {**environment, "ORT_DISABLE_TELEMETRY": "0"})
    assert list(tmp_path.rglob("deviceid")), "it does where it is let: the test sees it"


def test_it_would_warn_if_the_ring_were_copied(model: Path):
    """So that silence above means that nothing was copied."""
    warning = run(model, SEPARATE).stderr
    caches = 2 * SPEC.num_hidden_layers
    assert warning.count("in-place optimization not activated") == caches


def test_every_present_cache_is_the_memory_of_its_past():
    session = tiny.load(tiny.model_bytes(SPEC, "cpu"), SPEC)
    session.resize({4: 6, 16: 18})
    one = np.zeros((1, 1), np.int64)
    session.step(one, one, one)
    bound = {value.data_ptr() for value in session._decode_step(slice(0, 1)).binding.get_outputs()}
    caches = session._caches
    assert len(caches) == 2 * SPEC.num_hidden_layers
    for name, cache in caches.items():
        assert cache.ctypes.data in bound, f"present_{name} is somewhere else"


def test_a_step_writes_its_slots_and_no_others():
    session = tiny.load(tiny.model_bytes(SPEC, "cpu"), SPEC)
    session.resize({4: 6, 16: 18})
    ids, positions = tiny.tokens(SPEC, 3)[None], np.array([[18, 19, 20]])
    session.step(ids, positions, np.array([[2]]))
    for name, cache in session._caches.items():
        first = {"0": 18 % 6, "1": 18 % 18}[name.split(".")[1]]
        written = np.abs(cache).sum(axis=(0, 1, 3)) > 0
        assert np.flatnonzero(written).tolist() == [first, first + 1, first + 2], name


def test_growing_keeps_the_slots_that_were_written():
    session = tiny.load(tiny.model_bytes(SPEC, "cpu"), SPEC)
    session.resize({4: 3, 16: 3})
    session.step(tiny.tokens(SPEC, 3)[None], np.arange(3)[None], np.array([[2]]))
    before = {name: cache.copy() for name, cache in session._caches.items()}
    session.resize({4: 6, 16: 12})
    for name, cache in session._caches.items():
        np.testing.assert_array_equal(cache[:, :, :3], before[name])
        assert not cache[:, :, 3:].any(), f"{name}: new slots are to be empty"


# Memory


def test_decoding_allocates_nothing_per_token():
    session = tiny.session(SPEC)
    session.resize({4: 6, 16: 18})
    ids, positions, index = np.zeros((3, 1, 1), np.int64)

    def decode(steps: range) -> None:
        for position in steps:
            positions[0, 0] = position
            session.step(ids, positions, index)

    tracemalloc.start()
    try:
        decode(range(300))  # what is made once is made here
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        decode(range(300, 500))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # NumPy reports its arrays to tracemalloc. A row of logits is 256 bytes and a cache 768 or more:
    # 200 steps that kept the least of them would hold 51 kB, and a step that copied a cache for a
    # moment would show it on top of the 460 bytes that frames and integers were seen to take.
    assert kept - held < 256, f"200 steps kept {kept - held} bytes"
    assert peak - held < 1024, f"a step took {peak - held} bytes for a moment"


def test_one_token_steps_give_the_same_buffer_every_time():
    session = tiny.session(SPEC)
    session.resize({4: 6, 16: 18})
    one = np.zeros((1, 1), np.int64)
    assert session.step(one, one, one) is session.step(one, one + 1, one)


def test_bindings_of_rows_that_ran_long_ago_are_not_kept_and_run_again_all_the_same():
    session, rows = tiny.session(SPEC, batch=8), range(8)
    session.resize({4: 6, 16: 18})

    def logits(first: int, end: int) -> NDArray[np.float32]:
        ids = np.full((end - first, 1), 7)
        return session.step(ids, np.zeros_like(ids), np.zeros_like(ids), first).copy()

    spans = [(first, end) for first in rows for end in range(first + 1, 9)]
    assert len(spans) > 2 * KEPT_BINDINGS
    once = [logits(*span) for span in spans]
    assert len(session._decode_steps) == KEPT_BINDINGS
    for span, expected in zip(spans, once, strict=True):
        assert np.array_equal(logits(*span), expected), span


def test_resident_memory_does_not_grow_over_3000_tokens(model: Path):
    grown = int(run(model, MEASURE).stdout)
    # The tokens themselves take 4 bytes each, 12 kB; the allocator hands out pages of 4 kB. 1 kB
    # kept a step would be 3 MB.
    assert grown < 256 * 1024, f"{grown:,} bytes more after 3,000 tokens"


# Steps


def test_rows_of_a_longer_text_may_be_handed_over_as_views():
    spec = SPEC
    session, ids = tiny.session(spec, batch=2), np.stack([tiny.tokens(spec, 12, s) for s in (0, 1)])
    positions = np.arange(12)[None].repeat(2, 0)
    session.resize({4: 12, 16: 12})
    zero = np.zeros((2, 1), np.int64)
    whole = session.step(ids, positions, zero + 11).copy()
    session.step(ids[:, :6], positions[:, :6], zero + 5)
    views = session.step(ids[:, 6:], positions[:, 6:], zero + 5)
    # Six rows are added up in another order than twelve, see test_prefill_equals_decode.py.
    assert np.abs(views - whole).max() <= 1e-4


def test_logits_come_for_the_rows_asked_for_in_the_order_asked_for():
    session = tiny.session(SPEC)
    ring = Ring(SPEC, RING)
    ring.capacities = dict(ring.full)
    session.resize(ring.capacities)
    ids, positions = tiny.tokens(SPEC, 3)[None], np.arange(3)[None]
    every = session.step(ids, positions, np.array([[0, 1, 2]])).copy()
    some = session.step(ids, positions, np.array([[2, 0]]))
    assert some.shape == (1, 2, SPEC.vocab_size)
    # The same rows of the same product in two sizes of matrix: last bits may differ.
    assert np.abs(some[0] - every[0, [2, 0]]).max() <= 1e-5


def test_a_model_that_cannot_be_loaded_is_an_error_with_a_remedy(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(MistralcError, match=r"could not load .*Export the bundle again"):
        OrtSession(path, SPEC)


def test_attention_with_and_without_blocks_agrees_and_its_variable_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = replace(SPEC, layer_windows=(None, None))
    path = tmp_path / "model.onnx"
    path.write_bytes(tiny.model_bytes(spec, "cpu"))
    seen, make = [], ort.InferenceSession

    def recorded(*arguments: object) -> ort.InferenceSession:
        seen.append(os.environ.get(NO_FLASH))
        return make(*arguments)

    monkeypatch.delenv(NO_FLASH, raising=False)
    monkeypatch.setattr(ort, "InferenceSession", recorded)
    sessions = [OrtSession(path, spec, flash=flash) for flash in (True, False)]
    assert NO_FLASH not in os.environ
    monkeypatch.setenv(NO_FLASH, "0")
    OrtSession(path, spec, flash=False)
    assert seen == [None, "1", "0"], "what the user has set stays"
    ids, counts = tiny.tokens(spec, 40), [16, 1, 1, 5, 1, 16]
    with_blocks, without = (
        tiny.in_turns(session, Ring(spec, RingSpec(chunk=16, context=64)), ids, counts)
        for session in sessions
    )
    # Sums in another order; logits are about 4.
    assert 0 < np.abs(with_blocks - without).max() <= 2e-5
