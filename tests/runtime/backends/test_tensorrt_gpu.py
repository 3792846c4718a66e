"""TensorRT sessions on a real GPU; skipped without one."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from exporter.engine.process import build_engine
from exporter.engine.request import BuildRequest, profiles
from graphs.dtypes import Dtype
from graphs.errors import MistralcError
from graphs.passes.fix_dimensions import fix_dimensions
from graphs.passes.pipeline import lower
from runtime.backends import kernel_cache
from runtime.backends.tensorrt import TrtSession
from tests.support import tiny
from tests.support.device_session import (
    ENGINE_RING,
    ENGINE_SPEC,
    HALF,
    SPEC,
    check_choices,
    check_decode,
    check_decoder,
    open_plan,
    requires_gpu,
)

pytest.importorskip("tensorrt_rtx", reason="not installed: pip install 'mistralc[rtx]'")
pytest.importorskip("cuda.bindings", reason="not installed: pip install 'mistralc[rtx]'")


def step(session: TrtSession, position: int, count: int = 1) -> Any:
    ids = tiny.tokens(SPEC, count)[None]
    return session.step(ids, np.arange(position, position + count)[None], np.array([[count - 1]]))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`engines(target, activation)` builds a real plan of a tiny model, once."""
    made: dict[tuple[str, Dtype], Path] = {}

    def build(target: str, activation: Dtype) -> Path:
        if (target, activation) not in made:
            folder = tmp_path_factory.mktemp("engine")
            model = tiny.traced(ENGINE_SPEC, activation)
            built = tiny.build(ENGINE_SPEC, target, ring=ENGINE_RING, activation=activation)
            fix_dimensions(model, built.contract.capacities)
            lower(model, built)
            ir.save(tiny.fill(model, ENGINE_SPEC), folder / "model.onnx")
            path = folder / "engine.plan"
            build_engine(BuildRequest(
                graph=folder / "model.onnx", plan=path,
                contract=built.contract, target=target,
                profiles=profiles(ENGINE_RING, apart=built.decodes_apart),
            ))  # fmt: skip
            made[target, activation] = path
        return made[target, activation]

    return build


def open_engine(plan: Path, target: str, activation: Dtype, **options: Any) -> TrtSession:
    return open_plan(
        plan, target, spec=ENGINE_SPEC, ring=ENGINE_RING, activation=activation, **options
    )


on_gpu = pytest.mark.parametrize(
    ("target", "activation"),
    [
        pytest.param(target, activation, marks=requires_gpu(target))
        for target in ("rtx", "tensorrt")
        for activation in HALF
    ],
)


@on_gpu
def test_logits_equal_the_pytorch_decoders(engines: Any, target: str, activation: Dtype):
    with open_engine(engines(target, activation), target, activation) as session:
        check_decoder(session, ENGINE_SPEC, ENGINE_RING, HALF[activation])


@on_gpu
def test_decoding_agrees_with_prefill(engines: Any, target: str, activation: Dtype):
    with open_engine(engines(target, activation), target, activation) as session:
        check_decode(session, ENGINE_SPEC, ENGINE_RING, HALF[activation])


@on_gpu
def test_generated_tokens_are_likely_on_the_cpu(engines: Any, target: str, activation: Dtype):
    with open_engine(engines(target, activation), target, activation) as session:
        check_choices(session, ENGINE_SPEC, ENGINE_RING, HALF[activation])


@on_gpu
def test_decoding_is_captured(engines: Any, target: str, activation: Dtype):
    with open_engine(engines(target, activation), target, activation) as session:
        assert session.captured


@on_gpu
def test_a_step_writes_its_own_slots_only(engines: Any, target: str, activation: Dtype):
    with open_engine(engines(target, activation), target, activation) as session:
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
def test_a_long_text_allocates_no_memory(engines: Any, target: str, activation: Dtype):
    with open_engine(engines(target, activation), target, activation) as session:
        check_decode(session, ENGINE_SPEC, ENGINE_RING, HALF[activation])
        free, _ = session._gpu.free()
        for position in range(1000, 1300):
            step(session, position)
        # 64 MB allow for other processes on the GPU; a leak of one ring per step would exceed it.
        assert free - session._gpu.free()[0] < 64 << 20


@on_gpu
def test_a_truncated_plan_is_refused(engines: Any, target: str, activation: Dtype, tmp_path: Path):
    path = tmp_path / "engine.plan"
    data = engines(target, activation).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MistralcError, match="could not load"):
        open_engine(path, target, activation)


@pytest.mark.parametrize("target", [pytest.param("rtx", marks=requires_gpu("rtx"))])
def test_a_second_start_reuses_cached_kernels(engines: Any, target: str, tmp_path: Path):
    path, plan = tmp_path / "plan.bin", engines(target, "float16")
    for _ in range(2):
        with open_engine(plan, target, "float16", cache=path) as session:
            check_decoder(session, ENGINE_SPEC, ENGINE_RING, HALF["float16"])
        assert kernel_cache.read(path)
