"""ONNX Runtime CUDA sessions: results, memory, captured graphs, refusals.

Without a GPU they run on ONNX Runtime CPU with memory of a fake GPU (`fake_gpu.py`); tests marked
`gpu` run the same checks on a real one.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphs.dtypes import Dtype
from graphs.errors import MistralcError
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import AttentionForm
from runtime.backends import onnxruntime_cuda
from runtime.backends.onnxruntime_cuda import CudaOrtSession
from tests.support import tiny
from tests.support.device_session import (
    FLOAT32,
    HALF,
    RING,
    SPEC,
    check_choices,
    check_decode,
    check_decoder,
    check_generator,
    check_scheduler,
    full_ring,
    open_cuda,
    requires_gpu,
)
from tests.support.make_checkpoint import tiny_spec

pytest.importorskip("cuda.bindings", reason="not installed: pip install 'mistralc[cuda]'")

from tests.support.fake_gpu import FakeCudart, fake_cuda, fake_provider

CPU = "CPUExecutionProvider"
MIXED = tiny_spec(vocab_size=64, layer_windows=(8, None))  # shares its trace with other tests
MIXED_RING = RingSpec(chunk=3, context=60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "model.onnx"
    path.write_bytes(tiny.model_bytes(SPEC, "cuda", ring=RING))
    return path


@pytest.fixture(scope="module")
def mixed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer with a window and one without, which has `GroupQueryAttention`."""
    path = tmp_path_factory.mktemp("mixed") / "model.onnx"
    path.write_bytes(tiny.model_bytes(MIXED, "cuda", ring=MIXED_RING))
    return path


@pytest.fixture
def fake() -> Iterator[FakeCudart]:
    with fake_provider() as cudart:
        yield cudart


@pytest.fixture
def session(fake: FakeCudart, model: Path) -> Iterator[CudaOrtSession]:
    with open_cuda(model) as opened:
        yield opened


def step(session: CudaOrtSession, position: int, count: int = 1) -> Any:
    ids = tiny.tokens(SPEC, count)[None]
    return session.step(ids, np.arange(position, position + count)[None], np.array([[count - 1]]))


# Numbers


def test_logits_equal_the_pytorch_decoders_while_the_ring_wraps(session: CudaOrtSession):
    check_decoder(session, SPEC, RING, FLOAT32)


def test_decoding_agrees_with_prefill(session: CudaOrtSession):
    check_decode(session, SPEC, RING, FLOAT32)


def test_the_generator_gives_the_same_tokens_as_on_the_cpu(session: CudaOrtSession):
    check_generator(session, SPEC, RING)
    check_choices(session, SPEC, RING, FLOAT32)


def test_the_scheduler_serves_requests_on_the_rows_of_a_batch(fake: FakeCudart, model: Path):
    with open_cuda(model, batch=3) as rows:
        check_scheduler(rows, SPEC, RING)


# Rows of prompts


def check_rows(session: CudaOrtSession, tolerance: float) -> None:
    """Assert the PyTorch decoder's logits for another text in each row, in chunks and alone."""
    texts = [tiny.tokens(MIXED, 40, seed=row) for row in range(session.batch)]
    expected = np.stack([tiny.at_once(tiny.decoder(MIXED), text) for text in texts])
    found, here = [], 0
    for count in (3, 3, 3, 1, 2, *[3] * 4, 1, 1, 1, *[3] * 4, 1):
        ids = np.stack([text[here : here + count] for text in texts])
        steps = np.tile(np.arange(count), (session.batch, 1))
        found.append(session.step(ids, steps + here, steps).copy())
        here += count
    got = np.concatenate(found, axis=1)
    assert np.abs(got - expected[:, :here]).max() <= tolerance * np.abs(expected).max()


def test_a_prompt_runs_row_by_row_where_the_operator_takes_one_row(
    fake: FakeCudart, mixed_model: Path
):
    """`GroupQueryAttention` refuses several tokens after others in more than one row."""
    with open_cuda(mixed_model, spec=MIXED, ring=MIXED_RING, batch=3) as session:
        assert len(session._prefill) == 3
        check_rows(session, FLOAT32)


def test_the_scheduler_serves_requests_whose_prompts_run_row_by_row(
    fake: FakeCudart, mixed_model: Path
):
    with open_cuda(mixed_model, spec=MIXED, ring=MIXED_RING, batch=3) as rows:
        check_scheduler(rows, MIXED, MIXED_RING, count=25)


def test_a_model_without_that_operator_reads_prompts_in_all_rows_at_once(
    fake: FakeCudart, model: Path
):
    with open_cuda(model, batch=3) as session:
        assert len(session._prefill) == 1


# Memory


def test_the_ring_is_updated_in_place(session: CudaOrtSession, fake: FakeCudart):
    step(session, 18, 3)
    for i, first in enumerate((18 % 6, 18 % 18)):
        name = f"past_key.{i}"
        address, shape = session._buffers.addresses[name], session._buffers.shapes[name]
        block = fake.live[address]
        begin = address - block.ctypes.data
        ring = block[begin : begin + 4 * int(np.prod(shape))].view(np.float32).reshape(shape)
        written = ring.any(axis=(0, 1, 3))
        assert np.flatnonzero(written).tolist() == [first, first + 1, first + 2], name


def test_past_and_present_are_one_address(session: CudaOrtSession):
    addresses = session._buffers.addresses
    pasts = [name for name in addresses if name.startswith("past_")]
    assert len({addresses[name] for name in pasts}) == len(pasts) == 2 * SPEC.num_hidden_layers
    for name in pasts:
        assert addresses[name] == addresses[name.replace("past_", "present_")]


def test_decoding_allocates_no_device_memory(session: CudaOrtSession, fake: FakeCudart):
    step(session, 0)
    before = list(fake.live)
    for position in range(1, 40):
        step(session, position)
    assert list(fake.live) == before


def test_closing_frees_everything_and_closing_again_is_harmless(fake: FakeCudart, model: Path):
    session = open_cuda(model)
    step(session, 0)
    session.close()
    session.close()
    assert not fake.live
    with pytest.raises(MistralcError, match=r"closed\. Load the bundle again"):
        step(session, 0)


def test_a_failing_constructor_frees_everything(fake: FakeCudart, tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(MistralcError, match=r"could not load .* on CUDA.*export the bundle again"):
        open_cuda(path)
    assert not fake.live


# The graph of a decode step


def test_only_the_decode_step_runs_as_a_graph(session: CudaOrtSession):
    graph_ids = {id(options): graph for graph, options in session._options.items()}
    seen = []

    class Watched:
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            seen.append((binding is session._decode, graph_ids[id(options)]))

    real, session._session = session._session, Watched()
    step(session, 0)
    step(session, 1, 2)
    session._session = real
    assert seen == [(True, "1"), (False, "-1")]


def test_the_decode_step_is_bound_once(session: CudaOrtSession, monkeypatch: pytest.MonkeyPatch):
    bound: list[str] = []
    plain = session._bind
    monkeypatch.setattr(session, "_bind", lambda bind, tensor, *given: (
        bound.append(tensor.name), plain(bind, tensor, *given)
    ))  # fmt: skip
    step(session, 0)
    step(session, 1)
    assert bound == [], "addresses and shapes of a captured step may not change"
    step(session, 2, 2)
    assert set(bound) == {"input_ids", "position_ids", "logits_indices", "logits"}


@pytest.mark.parametrize(
    ("forms", "kernel"),
    [
        (("folded",), None), (("grouped", "folded"), None), (("masked",), None),
        (("unfused",), "16"), (("unfused", "grouped"), "17"),
    ],
)  # fmt: skip
def test_the_unfused_kernel_is_asked_for_by_the_form_of_attention(
    forms: tuple[AttentionForm, ...], kernel: str | None
):
    ((name, options),) = onnxruntime_cuda.providers(set(forms), graphs=True)
    assert name == "CUDAExecutionProvider"
    assert options["enable_cuda_graph"] == "1"
    assert options.get("sdpa_kernel") == kernel


def test_a_model_that_cannot_be_captured_runs_without_a_graph(
    fake: FakeCudart, model: Path, monkeypatch: pytest.MonkeyPatch
):
    plain = onnxruntime_cuda.providers
    attempts = []

    def providers(forms: set[AttentionForm], *, graphs: bool) -> Any:
        attempts.append(graphs)
        if graphs:
            raise RuntimeError("This session cannot use the graph capture feature as requested")
        return plain(forms, graphs=graphs)

    monkeypatch.setattr(onnxruntime_cuda, "providers", providers)
    with open_cuda(model) as session:
        assert not session.captured
        check_decoder(session, SPEC, RING, FLOAT32)
    assert attempts == [True, False]


# Refusals


@pytest.mark.parametrize(("first", "count"), [(4, 3), (5, 2), (17, 2)])
def test_a_step_across_the_rings_end_is_refused(session: CudaOrtSession, first: int, count: int):
    with pytest.raises(MistralcError, match="the end is crossed"):
        step(session, first, count)


def test_resize_accepts_the_full_capacities_only(session: CudaOrtSession):
    session.resize(full_ring(SPEC, RING).capacities)
    with pytest.raises(MistralcError, match="does not change"):
        session.resize({4: 3, 16: 3})


def test_the_cpu_package_of_onnxruntime_is_refused(monkeypatch: pytest.MonkeyPatch, model: Path):
    monkeypatch.setattr(
        onnxruntime_cuda.ort, "get_available_providers", lambda: ["CPUExecutionProvider"]
    )
    with pytest.raises(MistralcError, match=r"no CUDAExecutionProvider.*pip uninstall onnxruntime"):
        open_cuda(model, activation="float16")


def test_a_silent_fallback_to_the_cpu_is_an_error(monkeypatch: pytest.MonkeyPatch, model: Path):
    provider = "CUDAExecutionProvider"
    fallen = SimpleNamespace(get_providers=lambda: [CPU])
    monkeypatch.setattr(onnxruntime_cuda.ort, "get_available_providers", lambda: [provider])
    monkeypatch.setattr(onnxruntime_cuda.ort, "InferenceSession", lambda *given: fallen)
    with fake_cuda() as cudart:
        with pytest.raises(MistralcError, match=r"fell back to the CPU.*onnxruntime-gpu\[cuda"):
            open_cuda(model, activation="float16")
        assert not cudart.live


# On a GPU


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`models(activation)` writes a tiny model for the provider, once for each spec and ring."""
    made: dict[tuple[Dtype, ModelSpec], Path] = {}

    def build(activation: Dtype, spec: ModelSpec = SPEC, ring: RingSpec = RING) -> Path:
        if (activation, spec) not in made:
            path = made[activation, spec] = tmp_path_factory.mktemp("model") / "model.onnx"
            ir.save(tiny.fill(tiny.lowered(spec, "cuda", activation, ring), spec), path)
        return made[activation, spec]

    return build


on_gpu = pytest.mark.parametrize(
    "activation", [pytest.param(each, marks=requires_gpu("cuda")) for each in HALF]
)


@on_gpu
def test_on_a_gpu_logits_equal_the_pytorch_decoders(models: Any, activation: Dtype):
    with open_cuda(models(activation), activation=activation) as session:
        check_decoder(session, SPEC, RING, HALF[activation])


@on_gpu
def test_on_a_gpu_decoding_agrees_with_prefill(models: Any, activation: Dtype):
    with open_cuda(models(activation), activation=activation) as session:
        check_decode(session, SPEC, RING, HALF[activation])


@on_gpu
def test_on_a_gpu_generated_tokens_are_likely_on_the_cpu(models: Any, activation: Dtype):
    with open_cuda(models(activation), activation=activation) as session:
        check_choices(session, SPEC, RING, HALF[activation])


@on_gpu
def test_on_a_gpu_a_long_text_allocates_no_memory(models: Any, activation: Dtype):
    with open_cuda(models(activation), activation=activation) as session:
        check_decode(session, SPEC, RING, HALF[activation])
        free, _ = session._gpu.free()
        for position in range(1000, 1300):
            step(session, position)
        # 64 MB allow for other processes on the GPU; a leak of one ring per step would exceed it.
        assert free - session._gpu.free()[0] < 64 << 20


@on_gpu
def test_on_a_gpu_decoding_is_captured(models: Any, activation: Dtype):
    with open_cuda(models(activation), activation=activation) as session:
        assert session.captured


@on_gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_on_a_gpu_layers_without_a_window_agree_in_every_row(
    models: Any, activation: Dtype, batch: int
):
    model = models(activation, MIXED, MIXED_RING)
    with open_cuda(
        model, spec=MIXED, ring=MIXED_RING, activation=activation, batch=batch
    ) as session:
        assert session.captured
        check_rows(session, HALF[activation])
