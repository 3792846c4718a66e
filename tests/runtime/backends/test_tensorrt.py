"""TensorRT sessions: what they bind, copy, capture and free, and what they say when they cannot.

Without a GPU they run on one made of host memory (`fake_gpu.py`); tests marked `gpu` run the same
checks on a real one. What a host without library or driver is told is tested with the real modules.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.engine.process import build_engine
from exporter.engine.request import BuildRequest
from graphs.contract import GraphContract
from graphs.dtypes import Dtype
from graphs.errors import MistralcError
from graphs.passes.fix_dimensions import fix_dimensions
from graphs.passes.pipeline import lower
from graphs.spec import RingSpec
from runtime.backends import kernel_cache, tensorrt
from runtime.backends.plan_validity import explain
from runtime.backends.tensorrt import TrtSession
from runtime.system import host
from tests.support import tiny
from tests.support.device_session import (
    ENGINE_RING,
    ENGINE_SPEC,
    RING,
    SPEC,
    check_choices,
    check_decode,
    check_decoder,
    check_generator,
    check_scheduler,
    full_ring,
    requires_gpu,
)

pytest.importorskip("tensorrt_rtx", reason="not installed: pip install 'mistralc[rtx]'")
pytest.importorskip("cuda.bindings", reason="not installed: pip install 'mistralc[rtx]'")

from tests.support.fake_gpu import FakeEngine, FakeTrt, fake_tensorrt

ROOT = Path(__file__).resolve().parents[3]
# Sums in another order than PyTorch's, in float32: 1e-6 of the largest logit was seen.
FLOAT32 = 1e-4
# Two layers in half precision, whose rounding is 2^-11 and 2^-8: ten to twenty times that.
HALF: dict[Dtype, float] = {"float16": 1e-2, "bfloat16": 5e-2}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A "plan" of the GPU made of host memory."""
    path = tmp_path_factory.mktemp("fake") / "engine.plan"
    path.write_bytes(tiny.model_bytes(SPEC, "cpu"))
    return path


@pytest.fixture
def fake() -> Iterator[FakeTrt]:
    with fake_tensorrt(SPEC, RING) as module:
        yield module


@pytest.fixture(params=["rtx", "tensorrt"])
def session(request: pytest.FixtureRequest, fake: FakeTrt, plan: Path) -> Iterator[TrtSession]:
    with TrtSession(plan, SPEC, RING, "float32", request.param) as opened:
        yield opened


def step(session: TrtSession, position: int, count: int = 1) -> Any:
    ids = tiny.tokens(SPEC, count)[None]
    return session.step(ids, np.arange(position, position + count)[None], np.array([[count - 1]]))


# Numbers


def test_logits_are_the_pytorch_decoders_over_turns_of_the_ring(session: TrtSession):
    check_decoder(session, SPEC, RING, FLOAT32)


def test_decoding_agrees_with_prefill(session: TrtSession):
    check_decode(session, SPEC, RING, FLOAT32)


def test_the_generator_does_not_know_which_session_it_has(session: TrtSession):
    check_generator(session, SPEC, RING)
    check_choices(session, SPEC, RING, FLOAT32)


def test_rows_of_a_batch_are_independent(plan: Path):
    ring = RingSpec(chunk=3, context=1, max_batch=2)
    with fake_tensorrt(SPEC, ring), TrtSession(plan, SPEC, ring, "float32", "rtx", batch=2) as both:
        ids = np.stack([tiny.tokens(SPEC, 3), tiny.tokens(SPEC, 3, seed=1)])
        positions, indices = np.tile(np.arange(3), (2, 1)), np.tile(np.arange(3), (2, 1))
        found = both.step(ids, positions, indices).copy()
    for row in range(2):
        expected = tiny.at_once(tiny.decoder(SPEC), ids[row])
        assert np.abs(found[row] - expected).max() <= FLOAT32 * np.abs(expected).max()


def test_the_scheduler_serves_requests_on_the_rows_of_a_batch(plan: Path):
    ring = RingSpec(chunk=3, context=1, max_batch=3)
    with fake_tensorrt(SPEC, ring), TrtSession(plan, SPEC, ring, "float32", "rtx", batch=3) as rows:
        check_scheduler(rows, SPEC, ring)


# Memory


def test_past_and_present_are_one_allocation_and_no_two_caches_share_it(
    session: TrtSession, fake: FakeTrt
):
    for context in fake.engines[0].contexts:
        pasts = {n: a for n, a in context.addresses.items() if n.startswith("past_")}
        assert len(pasts) == len(set(pasts.values())) == 2 * SPEC.num_hidden_layers
        for name, address in pasts.items():
            assert context.addresses[name.replace("past_", "present_")] == address


def test_the_ring_is_empty_after_the_warm_up(session: TrtSession, fake: FakeTrt):
    for name, address in fake.engines[0].contexts[0].addresses.items():
        if name.startswith("past_"):
            assert not fake.cudart.live[address][address - fake.cudart.live[address].ctypes.data :][
                : np.prod(session._buffers.shapes[name]) * 4
            ].any(), name


def test_decoding_takes_no_device_memory(session: TrtSession, fake: FakeTrt):
    step(session, 0)
    before = dict(fake.cudart.live)
    for position in range(1, 40):
        step(session, position)
    assert fake.cudart.live.keys() == before.keys()


def test_closing_gives_everything_back_and_twice_is_once(fake: FakeTrt, plan: Path):
    session = TrtSession(plan, SPEC, RING, "float32", "tensorrt")
    session.step(np.zeros((1, 2), np.int64), np.arange(2)[None], np.arange(2)[None])
    assert fake.cudart.live
    session.close()
    session.close()
    assert not fake.cudart.live
    assert fake.cudart.used == 0
    with pytest.raises(MistralcError, match=r"closed\. Load the bundle again"):
        step(session, 0)


def test_logits_outlive_the_session(fake: FakeTrt, plan: Path):
    with TrtSession(plan, SPEC, RING, "float32", "rtx") as session:
        logits = step(session, 0)
        before = logits.copy()
    np.testing.assert_array_equal(logits, before)


def test_a_session_that_is_dropped_gives_everything_back(fake: FakeTrt, plan: Path):
    session = TrtSession(plan, SPEC, RING, "float32", "rtx")
    del session
    assert not fake.cudart.live


def test_a_constructor_that_fails_gives_everything_back(fake: FakeTrt, plan: Path):
    def broken(engine: FakeEngine) -> None:
        engine.broken = True

    fake.prepare = broken
    with pytest.raises(MistralcError, match=r"TensorRT could not run a step: it gave no reason"):
        TrtSession(plan, SPEC, RING, "float32", "rtx")
    assert not fake.cudart.live


def test_too_little_memory_says_how_much_is_needed_and_how_much_is_free(plan: Path):
    with fake_tensorrt(SPEC, RING, total=5000) as fake:
        with pytest.raises(
            MistralcError,
            match=r"no room for the KV ring: 2,304 bytes are needed, [\d,]+ of 5,000 are free",
        ):
            TrtSession(plan, SPEC, RING, "float32", "rtx")
        assert not fake.cudart.live


# The graph of a decode step


def test_tensorrt_decodes_by_launching_one_captured_graph(fake: FakeTrt, plan: Path):
    with TrtSession(plan, SPEC, RING, "float32", "tensorrt") as session:
        assert session.captured
        fake.cudart.calls.clear()
        step(session, 0)
        assert fake.cudart.calls == ["launch"], "copies are in the graph"
        step(session, 1, 2)
        assert fake.cudart.calls == ["launch", "copy", "copy"], "prompts are not"


def test_a_step_that_cannot_be_captured_runs_without(fake: FakeTrt, plan: Path):
    from tests.support.fake_gpu import real

    fake.cudart.fail["cudaStreamEndCapture"] = real.cudaError_t.cudaErrorStreamCaptureInvalidated
    with TrtSession(plan, SPEC, RING, "float32", "tensorrt") as session:
        assert not session.captured
        check_decoder(session, SPEC, RING, FLOAT32)


def test_tensorrt_rtx_is_told_to_capture_decoding_only(fake: FakeTrt, plan: Path):
    with TrtSession(plan, SPEC, RING, "float32", "rtx") as session:
        assert session.captured
        decode, prefill = (context.config for context in fake.engines[0].contexts)
        assert decode.cuda_graph_strategy == fake.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        assert prefill.cuda_graph_strategy == fake.CudaGraphStrategy.DISABLED
        assert "launch" not in fake.cudart.calls


def test_the_decode_contexts_shapes_and_addresses_never_change(session: TrtSession, fake: FakeTrt):
    decode = fake.engines[0].contexts[0]
    shapes, addresses = dict(decode.shapes), dict(decode.addresses)
    check_decode(session, SPEC, RING, FLOAT32)
    assert (decode.shapes, decode.addresses) == (shapes, addresses)


# Kernels of TensorRT-RTX


def test_compiled_kernels_are_kept_and_found_again(fake: FakeTrt, plan: Path, tmp_path: Path):
    path = tmp_path / "plan.bin"
    for loaded in (None, b"kernels"):
        fake.cache.loaded = None
        with TrtSession(plan, SPEC, RING, "float32", "rtx", cache=path):
            assert fake.cache.loaded == loaded
            assert all(each.config.cache is fake.cache for each in fake.engines[-1].contexts)
        assert kernel_cache.read(path) == b"kernels"


def test_a_damaged_cache_is_compiled_again(fake: FakeTrt, plan: Path, tmp_path: Path):
    path = tmp_path / "plan.bin"
    path.write_bytes(b"damaged")
    with TrtSession(plan, SPEC, RING, "float32", "rtx", cache=path):
        assert fake.cache.loaded is None
    assert kernel_cache.read(path) == b"kernels"


# Weight streaming


def test_a_budget_needs_a_plan_that_streams_weights(fake: FakeTrt, plan: Path):
    with pytest.raises(MistralcError, match=r"budget of 5 bytes .*--weight-streaming"):
        TrtSession(plan, SPEC, RING, "float32", "rtx", weight_budget=5)


@pytest.mark.parametrize(("given", "taken"), [(None, 1000), (700, 700), (9999, 5000)])
def test_the_budget_is_what_was_given_or_what_fits(
    fake: FakeTrt, plan: Path, given: int | None, taken: int
):
    def streaming(engine: FakeEngine) -> None:
        engine.streamable_weights_size = 5000

    fake.prepare = streaming
    with TrtSession(plan, SPEC, RING, "float32", "rtx", weight_budget=given) as session:
        assert fake.engines[0].weight_streaming_budget_v2 == taken
        assert session.captured == (taken == 5000), "what is streamed is not captured"


# Refusals


@pytest.mark.parametrize(("first", "count"), [(4, 3), (5, 2), (17, 2)])
def test_a_step_across_the_rings_end_is_refused_and_writes_nothing(
    session: TrtSession, fake: FakeTrt, first: int, count: int
):
    fake.cudart.calls.clear()
    with pytest.raises(MistralcError, match="the end is crossed"):
        step(session, first, count)
    assert not fake.cudart.calls


def test_another_ring_than_the_plans_is_refused(fake: FakeTrt, plan: Path):
    with pytest.raises(MistralcError, match=r"shape of past_key\.0 in the plan is .*6.*export"):
        TrtSession(plan, SPEC, RingSpec(chunk=5, context=1), "float32", "rtx")


def test_a_chunk_that_no_profile_covers_is_refused(fake: FakeTrt, plan: Path):
    fake.profiles = [(1, 2)]
    with pytest.raises(
        MistralcError, match=r"1 rows and steps of 1 to 3 tokens.*rows 1 to 1, tokens 1 to 2"
    ):
        TrtSession(plan, SPEC, RING, "float32", "rtx")
    assert not fake.cudart.live


def test_a_batch_that_no_profile_covers_is_refused(fake: FakeTrt, plan: Path):
    with pytest.raises(MistralcError, match=r"for 2 rows.*than --max-batch"):
        TrtSession(plan, SPEC, RING, "float32", "rtx", batch=2)


def test_of_two_profiles_each_context_takes_its_own(fake: FakeTrt, plan: Path):
    fake.profiles = [(1, 1), (1, 3)]
    with TrtSession(plan, SPEC, RING, "float32", "rtx") as session:
        assert [context.profile for context in fake.engines[0].contexts] == [0, 1]
        check_decoder(session, SPEC, RING, FLOAT32)


def test_a_plan_whose_caches_are_copied_is_refused(fake: FakeTrt, plan: Path):
    fake.separate = True
    with pytest.raises(
        MistralcError, match=r"memory of present_key\.0 in the plan is its own; past_key\.0"
    ):
        TrtSession(plan, SPEC, RING, "float32", "rtx")


def test_a_plan_of_another_type_is_refused(fake: FakeTrt, plan: Path):
    with pytest.raises(MistralcError, match=r"type of past_key\.0 in the plan is .*FLOAT; .*HALF"):
        TrtSession(plan, SPEC, RING, "float16", "rtx")


def test_a_plan_that_is_none_is_refused_with_tensorrts_verdict_on_it(fake: FakeTrt, tmp_path: Path):
    path = tmp_path / "engine.plan"
    path.write_bytes(b"damaged")
    with pytest.raises(MistralcError, match=r"\(7 bytes\): it is damaged .*Copy the bundle again"):
        TrtSession(path, SPEC, RING, "float32", "rtx")
    assert not fake.cudart.live


@pytest.mark.parametrize(
    ("diagnostics", "words"),
    [
        ([], r"Magic tag does not match\. Copy the bundle again"),
        (["VERSION_MISMATCH"], r"another version of TensorRT built it\. .*or install the version"),
        (["UNSUPPORTED_CC"], r"GPUs of another compute capability\. Export the checkpoint again"),
        (["OLD_CUDA_DRIVER"], r"driver is older than the plan needs\. Update the NVIDIA driver"),
    ],
)
def test_a_refused_plan_is_explained_by_the_verdict_or_else_in_tensorrts_words(
    fake: FakeTrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, diagnostics: Any, words: str
):
    verdict = explain("INVALID", diagnostics)
    monkeypatch.setattr(tensorrt, "validity", lambda *_: verdict)
    path = tmp_path / "engine.plan"
    path.write_bytes(b"damaged")
    with pytest.raises(MistralcError, match=words):
        TrtSession(path, SPEC, RING, "float32", "rtx")


def test_a_plan_larger_than_the_free_memory_is_told_so(plan: Path):
    with fake_tensorrt(SPEC, RING, total=5000) as fake:
        fake.refuse = True
        with pytest.raises(MistralcError, match=r"no room for the weights and the ring: [\d,]+"):
            TrtSession(plan, SPEC, RING, "float32", "rtx")


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("exists", [False, True])
def test_a_missing_or_empty_plan_is_refused(tmp_path: Path, *, exists: bool):
    path = tmp_path / "engine.plan"
    if exists:
        path.touch()
    with pytest.raises(MistralcError, match=r"missing or empty.*Copy the bundle again"):
        TrtSession(path, SPEC, RING, "float32", "rtx")


def test_resizing_takes_the_full_capacities_only(session: TrtSession):
    session.resize(full_ring(SPEC, RING).capacities)
    with pytest.raises(MistralcError, match="does not change"):
        session.resize({4: 3, 16: 3})


# Hosts that cannot run it, with the real modules


def run_without(module: str, plan: Path) -> str:
    """What constructing a session says in a process in which `module` cannot be imported."""
    program = f"""
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
from graphs.errors import MistralcError
from graphs.spec import RingSpec
from runtime.backends.tensorrt import TrtSession
from tests.support.make_checkpoint import tiny_spec
try:
    TrtSession(Path({str(plan)!r}), tiny_spec(), RingSpec(chunk=3, context=9), "float16", "rtx")
except MistralcError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_without_tensorrt_it_says_what_to_install(plan: Path):
    assert "pip install 'mistralc[rtx]'" in run_without("tensorrt_rtx", plan)


def test_without_cuda_bindings_it_says_what_to_install(plan: Path):
    said = run_without("cuda", plan)
    assert "cuda.bindings.runtime" in said
    assert "pip install 'mistralc[rtx]'" in said


@pytest.mark.skipif(host.cuda().problem is None, reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_to_do(plan: Path):
    with pytest.raises(MistralcError, match=r"needs an NVIDIA GPU, and here .*--target cpu"):
        TrtSession(plan, SPEC, RING, "float16", "rtx")


def test_a_driver_that_is_too_old_for_cuda_is_named(monkeypatch: pytest.MonkeyPatch, plan: Path):
    if host.cuda().problem is None:
        pytest.skip("there is a driver")
    monkeypatch.setattr(host, "cuda", lambda: host.Cuda(version=(11, 8)))  # cudart finds none
    with pytest.raises(MistralcError, match=r"failed in cuda\w+: .*Install a driver for CUDA 13"):
        TrtSession(plan, SPEC, RING, "float16", "rtx")


# On a GPU


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`engines(target, activation)` is a tiny model's real plan."""
    made: dict[tuple[str, Dtype], Path] = {}

    def build(target: str, activation: Dtype) -> Path:
        if (target, activation) not in made:
            folder = tmp_path_factory.mktemp("engine")
            model = tiny.traced(ENGINE_SPEC, activation)
            contract = GraphContract(spec=ENGINE_SPEC, ring=ENGINE_RING, activation=activation)
            fix_dimensions(model, contract.capacities)
            lower(model, ENGINE_SPEC, target)
            ir.save(tiny.fill(model, ENGINE_SPEC), folder / "model.onnx")
            path = folder / "engine.plan"
            build_engine(BuildRequest(
                graph=folder / "model.onnx", plan=path, contract=contract, target=target,
            ))  # fmt: skip
            made[target, activation] = path
        return made[target, activation]

    return build


on_gpu = pytest.mark.parametrize(
    ("target", "activation"),
    [
        pytest.param(target, activation, marks=requires_gpu(target))
        for target in ("rtx", "tensorrt")
        for activation in HALF
    ],
)


@on_gpu
def test_on_a_gpu_logits_are_the_pytorch_decoders(engines: Any, target: str, activation: Dtype):
    with TrtSession(
        engines(target, activation), ENGINE_SPEC, ENGINE_RING, activation, target
    ) as session:
        check_decoder(session, ENGINE_SPEC, ENGINE_RING, HALF[activation])


@on_gpu
def test_on_a_gpu_decoding_agrees_with_prefill(engines: Any, target: str, activation: Dtype):
    with TrtSession(
        engines(target, activation), ENGINE_SPEC, ENGINE_RING, activation, target
    ) as session:
        check_decode(session, ENGINE_SPEC, ENGINE_RING, HALF[activation])


@on_gpu
def test_on_a_gpu_the_generator_says_what_the_cpu_would(
    engines: Any, target: str, activation: Dtype
):
    with TrtSession(
        engines(target, activation), ENGINE_SPEC, ENGINE_RING, activation, target
    ) as session:
        check_choices(session, ENGINE_SPEC, ENGINE_RING, HALF[activation])


@on_gpu
def test_on_a_gpu_decoding_is_a_graph(engines: Any, target: str, activation: Dtype):
    with TrtSession(
        engines(target, activation), ENGINE_SPEC, ENGINE_RING, activation, target
    ) as session:
        assert session.captured


@on_gpu
def test_on_a_gpu_a_step_writes_its_slots_and_no_others(
    engines: Any, target: str, activation: Dtype
):
    with TrtSession(
        engines(target, activation), ENGINE_SPEC, ENGINE_RING, activation, target
    ) as session:
        step(session, 384, 3)
        buffers, gpu = session._buffers, session._gpu
        for i, first in enumerate((384 % 128, 384 % 192)):
            name = f"past_key.{i}"
            shape = buffers.shapes[name]  # [B, K, C, D]
            host_copy = gpu.pinned(int(np.prod(shape)) * 2, "a test")
            gpu.copy_out(host_copy, buffers.addresses[name])
            gpu.wait()
            written = host_copy.view(np.uint16).reshape(shape).any(axis=(0, 1, 3))
            assert np.flatnonzero(written).tolist() == [first, first + 1, first + 2], name


@on_gpu
def test_on_a_gpu_a_long_text_takes_no_memory(engines: Any, target: str, activation: Dtype):
    with TrtSession(
        engines(target, activation), ENGINE_SPEC, ENGINE_RING, activation, target
    ) as session:
        check_decode(session, ENGINE_SPEC, ENGINE_RING, HALF[activation])
        free, _ = session._gpu.free()
        for position in range(1000, 1300):
            step(session, position)
        # Others may use the GPU too: their noise is allowed, a leak of a ring per step is not.
        assert free - session._gpu.free()[0] < 64 << 20


@on_gpu
def test_on_a_gpu_a_truncated_plan_is_refused(
    engines: Any, target: str, activation: Dtype, tmp_path: Path
):
    path = tmp_path / "engine.plan"
    data = engines(target, activation).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MistralcError, match="could not load"):
        TrtSession(path, ENGINE_SPEC, ENGINE_RING, activation, target)


@pytest.mark.parametrize("target", [pytest.param("rtx", marks=requires_gpu("rtx"))])
def test_on_a_gpu_the_second_start_finds_the_kernels(engines: Any, target: str, tmp_path: Path):
    path, plan = tmp_path / "plan.bin", engines(target, "float16")
    for _ in range(2):
        with TrtSession(plan, ENGINE_SPEC, ENGINE_RING, "float16", target, cache=path) as session:
            check_decoder(session, ENGINE_SPEC, ENGINE_RING, HALF["float16"])
        assert kernel_cache.read(path)
