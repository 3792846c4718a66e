"""Batch invariance: logits are bit-identical for any batch and step size, and only with it."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.export import ExportOptions, export
from graphs.contract import PADDED
from graphs.errors import MistralcError, UsageError
from graphs.manifest import FILE_NAME
from graphs.passes.pipeline import lower
from graphs.spec import ModelSpec, RingSpec
from runtime.backends.onnxruntime_cpu import OrtSession
from runtime.backends.session import Ids, Logits
from runtime.decoding.generator import Generator
from runtime.decoding.golden import COMPARED, require_invariance
from runtime.decoding.ring import Ring
from runtime.decoding.sampling import SamplingParams
from runtime.load import load
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

LENGTH = 64  # tokens; also the context, so the last token still has a padding slot
SPECS = [
    tiny_spec(vocab_size=64, layer_windows=windows)
    for windows in ((5, None), (4, 16), (None, None))
]
GREEDY = SamplingParams(temperature=0)


@cache
def session(spec: ModelSpec, *, invariant: bool = True, batch: int = 1) -> OrtSession:
    model = tiny.traced(spec)
    ring = RingSpec(chunk=1, context=LENGTH)
    lower(model, tiny.build(spec, ring=ring, batch_invariant=invariant))
    data = ir.to_proto(tiny.fill(model, spec)).SerializeToString()
    return tiny.load(data, spec, batch, padded=PADDED if invariant else 0)


def ring_of(spec: ModelSpec, chunk: int, rows: int = 1) -> Ring:
    return Ring(spec, RingSpec(chunk=chunk, context=LENGTH, max_batch=rows), rows)


@cache
def one_by_one(spec: ModelSpec, *, invariant: bool = True) -> tiny.Logits:
    ids = tiny.tokens(spec, LENGTH)
    ring = ring_of(spec, 24)
    return tiny.in_turns(session(spec, invariant=invariant), ring, ids, [1] * LENGTH)


@st.composite
def turns(draw: st.DrawFn) -> list[int]:
    cuts = draw(st.sets(st.integers(1, LENGTH - 1), max_size=20))
    return [b - a for a, b in pairwise([0, *sorted(cuts), LENGTH])]


@settings(max_examples=60, deadline=None)
@given(spec=st.sampled_from(SPECS), turns=turns())
def test_any_split_into_steps_gives_the_same_bits(spec: ModelSpec, turns: list[int]):
    got = tiny.in_turns(session(spec), ring_of(spec, 24), tiny.tokens(spec, LENGTH), turns)
    assert np.array_equal(got, one_by_one(spec)), f"turns {turns}"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.layer_windows))
def test_without_batch_invariance_bits_differ_but_values_agree(spec: ModelSpec):
    plain = session(spec, invariant=False)
    ids = tiny.tokens(spec, LENGTH)
    got = tiny.in_turns(plain, ring_of(spec, 24), ids, [LENGTH])
    alone = one_by_one(spec, invariant=False)
    assert not np.array_equal(got, alone), "without this the tests above would prove nothing"
    assert np.abs(alone - one_by_one(spec)).max() <= 2e-5


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.layer_windows))
def test_rows_of_a_batch_get_the_bits_of_a_single_row(spec: ModelSpec):
    rows, ring = session(spec, batch=3), ring_of(spec, 24, rows=3)
    ring.capacities = dict(ring.full)
    rows.resize(ring.capacities)
    ids = tiny.tokens(spec, LENGTH)
    starts = np.array([[0], [3], [10]])
    for row, (start,) in enumerate(starts):  # each row at another position of the text
        if start:
            text = ids[None, :start]
            rows.step(text, np.arange(start)[None], np.array([[0]]), first=row)
    for step in range(LENGTH - 10):
        here = starts + step
        got = rows.step(ids[here], here, np.zeros((3, 1), np.int64))
        assert np.array_equal(got[:, 0], one_by_one(spec)[here[:, 0]]), f"step {step}"


class Counting:
    """A session that records the length of each step."""

    def __init__(self, real: OrtSession) -> None:
        self.real, self.resize, self.lengths = real, real.resize, list[int]()

    def step(self, input_ids: Ids, position_ids: Ids, logits_indices: Ids) -> Logits:
        self.lengths.append(input_ids.shape[1])
        return self.real.step(input_ids, position_ids, logits_indices)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.layer_windows))
def test_speculation_changes_no_bit_of_any_log_probability(spec: ModelSpec):
    params = replace(
        GREEDY, logprobs=1, logit_bias={3: 50.0, 9: 50.0}
    )  # two tokens, so the text soon repeats
    prompt = [3, 9, 9, 3] * 5
    found = {}
    for speculate in (0, 7):
        counting = Counting(session(spec))
        subject = Generator(counting, ring_of(spec, 8), spec.vocab_size)
        steps = subject.generate(
            subject.feed(prompt), params, max_new_tokens=40, speculate=speculate
        )
        found[speculate] = [(one.token_id, one.logprob) for one in steps]
        longest = max(counting.lengths[len(prompt) // 8 + 1 :])
        assert longest > 2 if speculate else longest == 1
    assert found[0] == found[7]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.layer_windows))
def test_a_session_without_batch_invariance_is_detected(spec: ModelSpec):
    text, good, bad = tiny.tokens(spec, 40), session(spec), session(spec, invariant=False)
    for subject in (good, bad):
        subject.resize(ring_of(spec, COMPARED).capacities)
    require_invariance(good, ring_of(spec, COMPARED), [{"ids": text}])
    with pytest.raises(MistralcError, match="alone and among others"):
        require_invariance(bad, ring_of(spec, COMPARED), [{"ids": text}])


# The command


def test_a_batch_invariant_bundle_says_so_and_reaches_the_end_of_its_context(tmp_path: Path):
    source = write_checkpoint(tmp_path / "checkpoint", tiny_spec())
    options = ExportOptions(batch_invariant=True, context=LENGTH)
    manifest = export(str(source), tmp_path / "bundle", options)
    assert manifest.passes["pad_query"] == manifest.model.num_hidden_layers
    assert manifest.batch_invariant
    generator = load(tmp_path / "bundle").generator
    steps = generator.generate(generator.feed([5] * (LENGTH - 4)), GREEDY)
    assert len(list(steps)) == 5
    assert generator.finish_reason == "length"


def test_a_bundle_that_wrongly_claims_batch_invariance_is_refused(tmp_path: Path):
    source = write_checkpoint(tmp_path / "checkpoint", tiny_spec())
    manifest = export(str(source), tmp_path / "bundle", ExportOptions())
    assert not manifest.batch_invariant
    load(tmp_path / "bundle")
    says = replace(manifest, passes={**manifest.passes, "pad_query": 2})
    (tmp_path / "bundle" / FILE_NAME).write_text(says.to_text(), encoding="utf-8")
    with pytest.raises(MistralcError, match="alone and among others"):
        load(tmp_path / "bundle")


@pytest.mark.parametrize("target", ["cuda", "rtx", "tensorrt"])
def test_batch_invariance_is_for_the_cpu_only(target: str):
    with pytest.raises(UsageError, match="--batch-invariant was given for --target"):
        ExportOptions(batch_invariant=True, target=target)
