"""Checks that every device session must pass, and marks for tests that need a GPU.

The fake GPU and real GPUs share these checks, so both kinds of test assert the same.
"""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from graphs.contract import GraphContract
from graphs.dtypes import Dtype
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import TARGETS
from runtime.backends.onnxruntime_cuda import CudaOrtSession
from runtime.backends.session import Session
from runtime.backends.tensorrt import TrtSession
from runtime.decoding.generator import Generator
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import SamplingParams
from runtime.scheduling.request import End, Request
from runtime.scheduling.scheduler import Scheduler
from runtime.system import host
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

SPEC = tiny_spec(vocab_size=64, layer_windows=(4, 16))
RING = RingSpec(chunk=3, context=1)
# Engines need chunks of at least 64 tokens: rings of 128 and 192 slots.
ENGINE_SPEC = tiny_spec(vocab_size=64, layer_windows=(4, 100))
ENGINE_RING = RingSpec(chunk=64, context=1)
GREEDY = SamplingParams(temperature=0.0)

# Tolerances, as shares of the largest logit. In float32 only the order of summation differs from
# PyTorch's, which gave 1e-6. Half precision rounds to 2^-11 (float16) or 2^-8 (bfloat16); two
# layers accumulate ten to twenty times that.
FLOAT32 = 1e-4
HALF: dict[Dtype, float] = {"float16": 1e-2, "bfloat16": 5e-2}


def open_plan(
    plan: Path,
    target: str = "rtx",
    *,
    spec: ModelSpec = SPEC,
    ring: RingSpec = RING,
    activation: Dtype = "float32",
    **options: Any,
) -> TrtSession:
    """A TensorRT session on `plan`."""
    contract = GraphContract(spec=spec, ring=ring, activation=activation)
    return TrtSession(plan, contract, TARGETS[target], **options)


def open_cuda(
    model: Path,
    *,
    spec: ModelSpec = SPEC,
    ring: RingSpec = RING,
    activation: Dtype = "float32",
    **options: Any,
) -> CudaOrtSession:
    """An ONNX Runtime CUDA session on `model`."""
    contract = GraphContract(spec=spec, ring=ring, activation=activation)
    return CudaOrtSession(model, contract, TARGETS["cuda"], **options)


def requires_gpu(target: str) -> list[pytest.MarkDecorator]:
    """Marks for a test that needs a GPU for `target`: skip with a reason if there is none."""
    reason = missing(target)
    return [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=reason or "")]


def missing(target: str) -> str | None:
    """Say what this host lacks to run `target`; None if it lacks nothing."""
    found = host.cuda()
    if found.problem is not None:
        return f"no GPU: {found.problem}"
    facts, device = TARGETS[target], found.devices[0]
    provider = facts.execution_provider
    if provider is not None and provider not in ort.get_available_providers():
        return f"{facts.distributions[0]} is not installed"
    if importlib.util.find_spec(facts.backend_module) is None:
        return f"{facts.backend_module} is not installed"
    if not facts.supports(device.compute_capability):
        return f"{facts.title} does not support the {device.name}"
    return None


def wrapping_length(spec: ModelSpec, ring: RingSpec) -> int:
    """The number of tokens after which the largest ring has wrapped twice."""
    return 2 * max(ring.capacity(window) for window in spec.windows) + 5


def full_ring(spec: ModelSpec, ring: RingSpec) -> Ring:
    """A ring with its full capacity from the start, as on every device."""
    return Ring(spec, ring, grows=False)


def check_decoder(session: Session, spec: ModelSpec, ring: RingSpec, tolerance: float) -> None:
    """Assert the PyTorch decoder's logits over a text that wraps every ring.

    `tolerance` is a share of the largest logit.
    """
    count = wrapping_length(spec, ring)
    ids = tiny.tokens(spec, count)
    expected = tiny.at_once(tiny.decoder(spec), ids)
    turns = (5, 1, 1, count - 12, 1, 1, 1, 1, 1)
    got = tiny.in_turns(session, full_ring(spec, ring), ids, turns)
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def check_decode(session: Session, spec: ModelSpec, ring: RingSpec, tolerance: float) -> None:
    """Assert the same logits for a text fed token by token and in chunks."""
    count = wrapping_length(spec, ring)
    ids = tiny.tokens(spec, count, seed=1)
    chunks = tiny.in_turns(session, full_ring(spec, ring), ids, (count,))
    single = tiny.in_turns(session, full_ring(spec, ring), ids, (1,) * count)
    assert np.abs(chunks - single).max() <= tolerance * np.abs(chunks).max()


def check_generator(session: Session, spec: ModelSpec, ring: RingSpec) -> None:
    """Assert the same tokens as on ONNX Runtime CPU, also after a rewind."""
    outputs = []
    for each, where in (
        (session, full_ring(spec, ring)),
        (tiny.session(spec), Ring(spec, ring)),
    ):
        generator = Generator(each, where, spec.vocab_size)
        tokens: list[int] = []
        for rewound in (False, True):
            if rewound:
                generator.rewind(generator.position - 1)
            logits = generator.feed([1, 2, 3, 4, 5, 6, 7])
            steps = generator.generate(logits, GREEDY, max_new_tokens=wrapping_length(spec, ring))
            tokens += [step.token_id for step in steps]
        outputs.append(tokens)
    assert outputs[0] == outputs[1]


def check_scheduler(
    session: Session, spec: ModelSpec, ring: RingSpec, count: int | None = None
) -> None:
    """Assert that concurrent requests get the tokens of the generator on ONNX Runtime CPU.

    `count` is the number of tokens to generate; by default every ring wraps.
    """
    count = count or wrapping_length(spec, ring)
    prompts = [tiny.tokens(spec, count, seed=count).tolist() for count in (2, 19, 9, 31, 5, 21)]
    where = Ring(spec, ring, session.batch, grows=False)
    subject = Scheduler(session, where)
    asked = [*prompts, prompts[3]]
    got: list[list[Any]] = [[] for _ in asked]
    for prompt, tokens in zip(asked, got, strict=True):
        request = Request(ids=tuple(prompt), params=GREEDY, max_new_tokens=count)
        subject.submit(request, partial(_keep, tokens))
    while subject.turn():
        pass
    assert subject.stats().cached_tokens == 30, "ten chunks of the prompt that was sent twice"
    for prompt, tokens in zip(asked, got, strict=True):
        generator = Generator(tiny.session(spec), Ring(spec, ring), spec.vocab_size)
        steps = generator.generate(generator.feed(prompt), GREEDY, max_new_tokens=count)
        assert tokens[:-1] == [step.token_id for step in steps]
        assert isinstance(tokens[-1], End)


def _keep(tokens: list[Any], item: Any) -> None:
    """Append a step's token, or how the request ended."""
    tokens.append(getattr(item, "token_id", item))


def check_choices(session: Session, spec: ModelSpec, ring: RingSpec, tolerance: float) -> None:
    """Assert that ONNX Runtime CPU gives every chosen token a logit close to the maximum.

    In half precision either of two nearly equal logits may win, so a chosen token's logit may be
    below the maximum by `tolerance`, a share of the largest logit.
    """
    prompt, count = [1, 2, 3, 4, 5, 6, 7], wrapping_length(spec, ring)
    generator = Generator(session, full_ring(spec, ring), spec.vocab_size)
    steps = generator.generate(generator.feed(prompt), GREEDY, max_new_tokens=count)
    taken = [step.token_id for step in steps]
    ids = np.array(prompt + taken[:-1])
    logits = tiny.in_turns(tiny.session(spec), Ring(spec, ring), ids, (len(ids),))
    chosen = logits[len(prompt) - 1 :]
    below = chosen.max(axis=-1) - chosen[np.arange(count), taken]
    assert below.max() <= tolerance * np.abs(logits).max()
