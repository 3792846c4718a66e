"""ONNX Runtime CPU sessions: in-place updates, no allocation while decoding, error messages.

Tests of ONNX Runtime's standard error and of memory run a small program in its own process, which
never imports torch.
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
SPEC = tiny_spec(vocab_size=64, layer_windows=(4, 16))  # shares its trace with other tests
RING = RingSpec(chunk=3, context=1)

# Loads the model argv[1] of the spec argv[2]; defines `session` and `ring`.
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


def test_onnx_runtime_prints_no_warning(model: Path):
    assert run(model, GENERATE).stderr == ""


def test_onnx_runtime_writes_nothing_to_the_users_cache(model: Path, tmp_path: Path):
    # The environment must not contain CI, which also disables telemetry.
    environment = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    run(model, GENERATE, environment)
    assert list(tmp_path.iterdir()) == []
    run(model, GENERATE, {**environment, "ORT_DISABLE_TELEMETRY": "0"})
    assert list(tmp_path.rglob("deviceid")), (
        "with telemetry it does write a file, so the test can detect it"
    )


def test_onnx_runtime_would_warn_if_the_ring_were_copied(model: Path):
    """No warning above therefore means that nothing was copied."""
    warning = run(model, SEPARATE).stderr
    caches = 2 * SPEC.num_hidden_layers
    assert warning.count("in-place optimization not activated") == caches


def test_every_present_cache_shares_the_memory_of_its_past():
    session = tiny.load(tiny.model_bytes(SPEC, "cpu"), SPEC)
    session.resize({4: 6, 16: 18})
    one = np.zeros((1, 1), np.int64)
    session.step(one, one, one)
    bound = {value.data_ptr() for value in session._decode_step(slice(0, 1)).binding.get_outputs()}
    caches = session._caches
    assert len(caches) == 2 * SPEC.num_hidden_layers
    for name, cache in caches.items():
        assert cache.ctypes.data in bound, f"present_{name} is in other memory"


def test_a_step_writes_its_own_slots_only():
    session = tiny.load(tiny.model_bytes(SPEC, "cpu"), SPEC)
    session.resize({4: 6, 16: 18})
    ids, positions = tiny.tokens(SPEC, 3)[None], np.array([[18, 19, 20]])
    session.step(ids, positions, np.array([[2]]))
    for name, cache in session._caches.items():
        first = {"0": 18 % 6, "1": 18 % 18}[name.split(".")[1]]
        written = np.abs(cache).sum(axis=(0, 1, 3)) > 0
        assert np.flatnonzero(written).tolist() == [first, first + 1, first + 2], name


def test_growing_keeps_the_written_slots():
    session = tiny.load(tiny.model_bytes(SPEC, "cpu"), SPEC)
    session.resize({4: 3, 16: 3})
    session.step(tiny.tokens(SPEC, 3)[None], np.arange(3)[None], np.array([[2]]))
    before = {name: cache.copy() for name, cache in session._caches.items()}
    session.resize({4: 6, 16: 12})
    for name, cache in session._caches.items():
        np.testing.assert_array_equal(cache[:, :, :3], before[name])
        assert not cache[:, :, 3:].any(), f"{name}: new slots must be empty"


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
        decode(range(300))  # one-time allocations happen here
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        decode(range(300, 500))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # NumPy reports its arrays to tracemalloc. A row of logits has 256 bytes, a cache at least 768.
    # 200 steps that kept one row each would hold 51 kB. A step that copied a cache temporarily
    # would add at least 768 bytes to the 460 measured for frames and integers.
    assert kept - held < 256, f"200 steps kept {kept - held} bytes"
    assert peak - held < 1024, f"a step allocated {peak - held} bytes temporarily"


def test_single_token_steps_return_the_same_buffer():
    session = tiny.session(SPEC)
    session.resize({4: 6, 16: 18})
    one = np.zeros((1, 1), np.int64)
    assert session.step(one, one, one) is session.step(one, one + 1, one)


def test_old_bindings_are_evicted_and_made_again():
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
    # The tokens take 4 bytes each, 12 kB in all; the allocator uses pages of 4 kB. A leak of 1 kB
    # per step would be 3 MB.
    assert grown < 256 * 1024, f"{grown:,} bytes more after 3,000 tokens"


# Steps


def test_inputs_may_be_views_of_longer_arrays():
    spec = SPEC
    session, ids = tiny.session(spec, batch=2), np.stack([tiny.tokens(spec, 12, s) for s in (0, 1)])
    positions = np.arange(12)[None].repeat(2, 0)
    session.resize({4: 12, 16: 12})
    zero = np.zeros((2, 1), np.int64)
    whole = session.step(ids, positions, zero + 11).copy()
    session.step(ids[:, :6], positions[:, :6], zero + 5)
    views = session.step(ids[:, 6:], positions[:, 6:], zero + 5)
    # Six rows are summed in another order than twelve, see test_prefill_equals_decode.py.
    assert np.abs(views - whole).max() <= 1e-4


def test_logits_are_those_of_the_requested_rows_in_the_requested_order():
    session = tiny.session(SPEC)
    ring = Ring(SPEC, RING)
    ring.capacities = dict(ring.full)
    session.resize(ring.capacities)
    ids, positions = tiny.tokens(SPEC, 3)[None], np.arange(3)[None]
    every = session.step(ids, positions, np.array([[0, 1, 2]])).copy()
    some = session.step(ids, positions, np.array([[2, 0]]))
    assert some.shape == (1, 2, SPEC.vocab_size)
    # The same rows from matrix products of two sizes: the last bits may differ.
    assert np.abs(some[0] - every[0, [2, 0]]).max() <= 1e-5


def test_a_model_that_cannot_be_loaded_is_an_error_with_a_remedy(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(MistralcError, match=r"could not load .*Export the bundle again"):
        OrtSession(path, SPEC)


def test_flash_attention_agrees_and_its_environment_variable_is_restored(
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
    assert seen == [None, "1", "0"], "a value that the user has set must stay"
    ids, counts = tiny.tokens(spec, 40), [16, 1, 1, 5, 1, 16]
    flash, plain = (
        tiny.in_turns(session, Ring(spec, RingSpec(chunk=16, context=64)), ids, counts)
        for session in sessions
    )
    # Another summation order; logits are about 4.
    assert 0 < np.abs(flash - plain).max() <= 2e-5
