"""TensorRT sessions on the fake GPU: results, memory, captured graphs, kernels, weight streaming.

`test_tensorrt_gpu.py` runs the same checks on a real GPU.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphs.errors import MistralcError
from graphs.spec import RingSpec
from runtime.backends import kernel_cache
from runtime.backends.tensorrt import TrtSession
from tests.support import tiny
from tests.support.device_session import (
    FLOAT32,
    RING,
    SPEC,
    check_choices,
    check_decode,
    check_decoder,
    check_generator,
    check_scheduler,
    open_plan,
)

pytest.importorskip("tensorrt_rtx", reason="not installed: pip install 'mistralc[rtx]'")
pytest.importorskip("cuda.bindings", reason="not installed: pip install 'mistralc[rtx]'")

from tests.support.fake_gpu import FakeEngine, FakeTrt, fake_tensorrt, real


def step(session: TrtSession, position: int, count: int = 1) -> Any:
    ids = tiny.tokens(SPEC, count)[None]
    return session.step(ids, np.arange(position, position + count)[None], np.array([[count - 1]]))


def test_logits_equal_the_pytorch_decoders_while_the_ring_wraps(session: TrtSession):
    check_decoder(session, SPEC, RING, FLOAT32)


def test_decoding_agrees_with_prefill(session: TrtSession):
    check_decode(session, SPEC, RING, FLOAT32)


def test_the_generator_gives_the_same_tokens_as_on_the_cpu(session: TrtSession):
    check_generator(session, SPEC, RING)
    check_choices(session, SPEC, RING, FLOAT32)


def test_rows_of_a_batch_are_independent(plan: Path):
    ring = RingSpec(chunk=3, context=1, max_batch=2)
    with fake_tensorrt(SPEC, ring), open_plan(plan, ring=ring, batch=2) as both:
        ids = np.stack([tiny.tokens(SPEC, 3), tiny.tokens(SPEC, 3, seed=1)])
        positions, indices = np.tile(np.arange(3), (2, 1)), np.tile(np.arange(3), (2, 1))
        found = both.step(ids, positions, indices).copy()
    for row in range(2):
        expected = tiny.at_once(tiny.decoder(SPEC), ids[row])
        assert np.abs(found[row] - expected).max() <= FLOAT32 * np.abs(expected).max()


@pytest.mark.parametrize("target", ["rtx", "tensorrt"])
def test_sessions_with_more_rows_share_one_engine(target: str, plan: Path):
    ring = RingSpec(chunk=3, context=1, max_batch=3)
    with fake_tensorrt(SPEC, ring) as fake:
        with open_plan(plan, target, ring=ring) as one:
            check_decode(one, SPEC, ring, FLOAT32)
            held = fake.cudart.used
            with one.with_rows(3) as three:
                assert len(fake.engines) == 1, "the plan was loaded again"
                assert three.captured
                check_scheduler(three, SPEC, ring)
            assert fake.cudart.used == held, "its memory was not freed"
            check_decode(one, SPEC, ring, FLOAT32)
        assert not fake.cudart.live


def test_the_scheduler_serves_requests_on_the_rows_of_a_batch(plan: Path):
    ring = RingSpec(chunk=3, context=1, max_batch=3)
    with fake_tensorrt(SPEC, ring), open_plan(plan, ring=ring, batch=3) as rows:
        check_scheduler(rows, SPEC, ring)


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


def test_decoding_allocates_no_device_memory(session: TrtSession, fake: FakeTrt):
    step(session, 0)
    before = dict(fake.cudart.live)
    for position in range(1, 40):
        step(session, position)
    assert fake.cudart.live.keys() == before.keys()


def test_both_contexts_share_the_memory_of_the_larger_profile(fake: FakeTrt, plan: Path):
    fake.profiles = [(2, 1), (2, RING.chunk)]
    with open_plan(plan) as session:
        decode, prompt = fake.engines[0].contexts
        assert (decode.profile, prompt.profile) == (0, 1)
        assert decode.scratch == prompt.scratch
        assert decode.scratch[1] == 1000 * RING.chunk
        check_decode(session, SPEC, RING, FLOAT32)


def test_closing_frees_everything_and_closing_again_is_harmless(fake: FakeTrt, plan: Path):
    session = open_plan(plan, "tensorrt")
    session.step(np.zeros((1, 2), np.int64), np.arange(2)[None], np.arange(2)[None])
    assert fake.cudart.live
    session.close()
    session.close()
    assert not fake.cudart.live
    assert fake.cudart.used == 0
    with pytest.raises(MistralcError, match=r"closed\. Load the bundle again"):
        step(session, 0)


def test_logits_outlive_the_session(fake: FakeTrt, plan: Path):
    with open_plan(plan) as session:
        logits = step(session, 0)
        before = logits.copy()
    np.testing.assert_array_equal(logits, before)


def test_a_deleted_session_frees_everything(fake: FakeTrt, plan: Path):
    session = open_plan(plan)
    del session
    assert not fake.cudart.live


def test_a_failing_constructor_frees_everything(fake: FakeTrt, plan: Path):
    def broken(engine: FakeEngine) -> None:
        engine.broken = True

    fake.prepare = broken
    with pytest.raises(MistralcError, match=r"TensorRT could not run a step: it gave no reason"):
        open_plan(plan)
    assert not fake.cudart.live


def test_out_of_memory_reports_needed_and_free_bytes(plan: Path):
    with fake_tensorrt(SPEC, RING, total=5000) as fake:
        with pytest.raises(
            MistralcError,
            match=r"no room for the KV ring: 2,304 bytes are needed, [\d,]+ of 5,000 are free",
        ):
            open_plan(plan)
        assert not fake.cudart.live


def test_tensorrt_decodes_by_launching_one_captured_graph(fake: FakeTrt, plan: Path):
    with open_plan(plan, "tensorrt") as session:
        assert session.captured
        fake.cudart.calls.clear()
        step(session, 0)
        assert fake.cudart.calls == ["launch"], "the graph contains the copies"
        step(session, 1, 2)
        assert fake.cudart.calls == ["launch", "copy", "copy"], "prefill is not captured"


def test_a_step_that_cannot_be_captured_runs_without_a_graph(fake: FakeTrt, plan: Path):
    fake.cudart.fail["cudaStreamEndCapture"] = real.cudaError_t.cudaErrorStreamCaptureInvalidated
    with open_plan(plan, "tensorrt") as session:
        assert not session.captured
        check_decoder(session, SPEC, RING, FLOAT32)


def test_tensorrt_rtx_captures_decoding_only(fake: FakeTrt, plan: Path):
    with open_plan(plan) as session:
        assert session.captured
        decode, prefill = (context.config for context in fake.engines[0].contexts)
        assert decode.cuda_graph_strategy == fake.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        assert prefill.cuda_graph_strategy == fake.CudaGraphStrategy.DISABLED
        assert "launch" not in fake.cudart.calls


def test_shapes_and_addresses_of_the_decode_context_never_change(
    session: TrtSession, fake: FakeTrt
):
    decode = fake.engines[0].contexts[0]
    shapes, addresses = dict(decode.shapes), dict(decode.addresses)
    check_decode(session, SPEC, RING, FLOAT32)
    assert (decode.shapes, decode.addresses) == (shapes, addresses)


def test_compiled_kernels_are_cached_and_reused(fake: FakeTrt, plan: Path, tmp_path: Path):
    path = tmp_path / "plan.bin"
    for loaded in (None, b"kernels"):
        fake.cache.loaded = None
        with open_plan(plan, cache=path):
            assert fake.cache.loaded == loaded
            assert all(each.config.cache is fake.cache for each in fake.engines[-1].contexts)
        assert kernel_cache.read(path) == b"kernels"


def test_a_damaged_kernel_cache_is_replaced(fake: FakeTrt, plan: Path, tmp_path: Path):
    path = tmp_path / "plan.bin"
    path.write_bytes(b"damaged")
    with open_plan(plan, cache=path):
        assert fake.cache.loaded is None
    assert kernel_cache.read(path) == b"kernels"


def test_a_weight_budget_needs_a_plan_with_weight_streaming(fake: FakeTrt, plan: Path):
    with pytest.raises(MistralcError, match=r"budget of 5 bytes .*--weight-streaming"):
        open_plan(plan, weight_budget=5)


@pytest.mark.parametrize(("given", "taken"), [(None, 1000), (700, 700), (9999, 5000)])
def test_the_weight_budget_is_the_given_one_or_the_automatic_one(
    fake: FakeTrt, plan: Path, given: int | None, taken: int
):
    def streaming(engine: FakeEngine) -> None:
        engine.streamable_weights_size = 5000

    fake.prepare = streaming
    with open_plan(plan, weight_budget=given) as session:
        assert fake.engines[0].weight_streaming_budget_v2 == taken
        assert session.captured == (taken == 5000), "streamed weights prevent a capture"
