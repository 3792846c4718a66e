"""What every session on a device must do, as checks for any of them; and who has a GPU.

Asserted the same way for the GPU made of host memory and for a real one, so that a test that runs
without a GPU and one that needs it cannot come to mean different things.
"""

import importlib.util

import numpy as np
import onnxruntime as ort
import pytest

from graphs.gpu_catalogue import runs_rtx
from graphs.spec import ModelSpec, RingSpec
from runtime.backends.session import Session
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
# An engine's chunk cannot be as small: rings of 128 and 192 slots.
ENGINE_SPEC = tiny_spec(vocab_size=64, layer_windows=(4, 100))
ENGINE_RING = RingSpec(chunk=64, context=1)
GREEDY = SamplingParams(temperature=0.0)


def requires_gpu(target: str) -> list[pytest.MarkDecorator]:
    """The marks of a test that needs a GPU for `target`: skipped, with the reason, without one."""
    reason = missing(target)
    return [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=reason or "")]


def missing(target: str) -> str | None:
    """What this host lacks to run `target`; None if nothing."""
    found = host.cuda()
    if found.problem is not None:
        return f"no GPU: {found.problem}"
    if target == "cuda":
        has = "CUDAExecutionProvider" in ort.get_available_providers()
        return None if has else "onnxruntime-gpu is not installed"
    module = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}[target]
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    device = found.devices[0]
    if target == "rtx" and not runs_rtx(device.compute_capability):
        return f"TensorRT-RTX does not support the {device.name}"
    return None


def long(spec: ModelSpec, ring: RingSpec) -> int:
    """Tokens of a text that wraps the largest ring twice."""
    return 2 * max(ring.capacity(window) for window in spec.windows) + 5


def full_ring(spec: ModelSpec, ring: RingSpec) -> Ring:
    """A ring that is full from the start, as a device's is."""
    return Ring(spec, ring, grows=False)


def check_decoder(session: Session, spec: ModelSpec, ring: RingSpec, tolerance: float) -> None:
    """Logits of a text that wraps every ring are the PyTorch decoder's.

    `tolerance` is a share of the largest logit.
    """
    count = long(spec, ring)
    ids = tiny.tokens(spec, count)
    expected = tiny.at_once(tiny.decoder(spec), ids)
    turns = (5, 1, 1, count - 12, 1, 1, 1, 1, 1)
    got = tiny.in_turns(session, full_ring(spec, ring), ids, turns)
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def check_decode(session: Session, spec: ModelSpec, ring: RingSpec, tolerance: float) -> None:
    """A text token by token, and the same in chunks, end in the same logits."""
    count = long(spec, ring)
    ids = tiny.tokens(spec, count, seed=1)
    chunks = tiny.in_turns(session, full_ring(spec, ring), ids, (count,))
    single = tiny.in_turns(session, full_ring(spec, ring), ids, (1,) * count)
    assert np.abs(chunks - single).max() <= tolerance * np.abs(chunks).max()


def check_generator(session: Session, spec: ModelSpec, ring: RingSpec) -> None:
    """The generator says the same on this session and on ONNX Runtime CPU, also after a rewind."""
    said = []
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
            steps = generator.generate(logits, GREEDY, max_new_tokens=long(spec, ring))
            tokens += [step.token_id for step in steps]
        said.append(tokens)
    assert said[0] == said[1]


def check_scheduler(session: Session, spec: ModelSpec, ring: RingSpec) -> None:
    """Requests side by side get what the generator says on ONNX Runtime CPU, each alone."""
    prompts = [tiny.tokens(spec, count, seed=count).tolist() for count in (2, 19, 9, 31, 5, 21)]
    where = Ring(spec, ring, session.batch, grows=False)
    subject = Scheduler(session, where)
    got: list[list[int]] = [[] for _ in prompts]
    for prompt, tokens in zip((*prompts, prompts[3]), (*got, again := []), strict=True):
        request = Request(ids=tuple(prompt), params=GREEDY, max_new_tokens=long(spec, ring))
        subject.submit(request, lambda item, to=tokens: to.append(getattr(item, "token_id", item)))
    while subject.turn():
        pass
    assert subject.stats().cached_tokens == 30, "ten chunks of the prompt that came twice"
    for prompt, tokens in zip((*prompts, prompts[3]), (*got, again), strict=True):
        generator = Generator(tiny.session(spec), Ring(spec, ring), spec.vocab_size)
        steps = generator.generate(generator.feed(prompt), GREEDY, max_new_tokens=long(spec, ring))
        assert tokens[:-1] == [step.token_id for step in steps]
        assert isinstance(tokens[-1], End)


def check_choices(session: Session, spec: ModelSpec, ring: RingSpec, tolerance: float) -> None:
    """Every token that the generator takes on this session is one ONNX Runtime CPU likes as well.

    Two tokens may be as good as equal, and in half precision either may win: the one taken may be
    behind by `tolerance`, a share of the largest logit.
    """
    prompt, count = [1, 2, 3, 4, 5, 6, 7], long(spec, ring)
    generator = Generator(session, full_ring(spec, ring), spec.vocab_size)
    steps = generator.generate(generator.feed(prompt), GREEDY, max_new_tokens=count)
    taken = [step.token_id for step in steps]
    ids = np.array(prompt + taken[:-1])
    logits = tiny.in_turns(tiny.session(spec), Ring(spec, ring), ids, (len(ids),))
    asked = logits[len(prompt) - 1 :]
    behind = asked.max(axis=-1) - asked[np.arange(count), taken]
    assert behind.max() <= tolerance * np.abs(logits).max()
