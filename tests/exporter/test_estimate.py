"""What a model needs: figures worked out by hand, and the command that prints them."""

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from exporter.bundle.weights_file import WeightsLayout
from exporter.checkpoint.open import open_checkpoint
from exporter.decide import decide
from exporter.estimate import host, refusal
from exporter.estimate.model import RUNTIME_RESERVE, Estimate, estimate, fit
from exporter.estimate.refusal import require_host
from exporter.options import BuildOptions
from exporter.quantization.make_recipe import make_recipe
from exporter.quantization.policy import WeightFacts
from graphs.build import Build
from graphs.errors import MistralcError, UsageError
from graphs.gpu_catalogue import GPUS
from graphs.precisions import PRECISIONS
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import TARGETS, target_named
from tests.conftest import Command
from tests.support.make_checkpoint import PRESETS, tiny_spec, write_checkpoint

MISTRAL_7B = ModelSpec(
    vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32_768,
    rms_norm_eps=1e-5, rope_theta=10_000.0, layer_windows=(4096,) * 32,
)  # fmt: skip
RING = RingSpec(chunk=512, context=4096)

LINEARS = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14_336)  # q o, k v, gate up down
NORMS = 32 * 2 * 4096 + 4096
EMBEDDING = 32_000 * 4096  # as large as the output layer


def build_of(spec: ModelSpec, ring: RingSpec, target: str, precision: str) -> Build:
    decided = decide(spec, TARGETS[target], BuildOptions(precision=precision))
    return replace(decided, contract=replace(decided.contract, ring=ring))


def plan(spec: ModelSpec, ring: RingSpec, target: str, precision: str) -> Estimate:
    return estimate(build_of(spec, ring, target, precision))


def of_7b(target: str = "rtx", precision: str = "fp16", ring: RingSpec = RING) -> Estimate:
    return plan(MISTRAL_7B, ring, target, precision)


# The arithmetic


def test_mistral_7b_has_its_public_figures() -> None:
    needed = of_7b()
    assert needed.parameters == LINEARS + NORMS + 2 * EMBEDDING == 7_241_732_096
    assert needed.weight_bytes == 14_483_464_192  # 14.5 GB
    assert needed.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2 == 131_072
    heads = needed.query_heads_per_group  # times as much without grouped queries
    assert heads * needed.kv_bytes_per_token == 4 * 131_072
    assert needed.ring_slots == {4096: 4608}
    assert needed.ring_bytes == 4608 * 131_072 == 603_979_776
    assert heads * needed.ring_bytes == 4 * 603_979_776
    assert needed.kv_bytes_unwindowed == 32_768 * 131_072


def test_a_quantized_model_is_as_large_as_its_codes_and_scales() -> None:
    kept, rows = 2 * (NORMS + EMBEDDING), 32 * (4096 + 2 * 1024 + 4096 + 2 * 14_336 + 4096)
    head = EMBEDDING + 2 * 32_000  # where weights alone are quantized: 8 bits, a scale each row
    assert of_7b(precision="int8wo").weight_bytes == LINEARS + 2 * rows + kept + head
    blocks = LINEARS // 2 + 2 * LINEARS // 128
    assert of_7b(precision="int4wo").weight_bytes == blocks + kept + head == 3_992_525_312
    for precision in ("int8", "fp8"):
        assert of_7b(precision=precision).weight_bytes == LINEARS + 2 * rows + kept + 2 * EMBEDDING
    # ONNX Runtime CPU computes in float32, and takes blocks of 32.
    on_cpu = of_7b("cpu", "int4wo")
    codes = LINEARS // 2 + (4 * 2 + 1) * LINEARS // 64  # float32 scales, two zero points to a byte
    assert on_cpu.weight_bytes == codes + 2 * kept + EMBEDDING + 4 * EMBEDDING // 32
    assert on_cpu.kv_bytes_per_token == 2 * 131_072


@pytest.mark.parametrize("target", ["cpu", "cuda", "rtx"])
@pytest.mark.parametrize("precision", ["int8wo", "int4wo"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_estimate_is_what_the_export_writes(
    tmp_path: Path, target: str, precision: str, tied: bool
) -> None:
    spec = tiny_spec(hidden_size=128, intermediate_size=256, tie_word_embeddings=tied)
    write_checkpoint(tmp_path, spec)
    needed = plan(spec, RING, target, precision)
    recipe = make_recipe(needed.build, open_checkpoint(tmp_path), None)
    assert needed.weight_bytes == WeightsLayout.of(recipe).weight_bytes


def test_the_quantized_kv_ring_stays_as_it_computes() -> None:
    assert of_7b(precision="int4wo").ring_bytes == of_7b(precision="bf16").ring_bytes


def test_rows_multiply_the_ring_and_not_the_weights() -> None:
    one, eight = of_7b(), of_7b(ring=RingSpec(chunk=512, context=4096, max_batch=8))
    assert eight.ring_bytes == 8 * one.ring_bytes
    assert eight.kv_bytes_unwindowed == 8 * one.kv_bytes_unwindowed
    assert eight.weight_bytes == one.weight_bytes
    assert eight.step_parts["weights"] == one.step_parts["weights"]
    for part in ("ring", "activations"):
        assert eight.step_parts[part] == 8 * one.step_parts[part]


def test_activations_are_the_largest_of_logits_mlp_and_attention() -> None:
    needed = of_7b()
    assert needed.activation_parts == {
        "logits": 32_000 * 2,
        "mlp": 2 * 512 * 14_336 * 2,
        "attention": 512 * 4608 + 512 * 32 * 4608 * 2,
    }
    assert needed.activation_bytes == needed.activation_parts["attention"]
    wide = plan(tiny_spec(vocab_size=10**6, window=4), RingSpec(chunk=1, context=8), "cpu", "fp32")
    assert wide.activation_bytes == wide.activation_parts["logits"] == 4 * 10**6


def test_layers_of_different_windows_have_rings_of_their_own() -> None:
    spec = tiny_spec(num_hidden_layers=3, layer_windows=(None, 8, 8))
    needed = plan(spec, RingSpec(chunk=4, context=100), "cpu", "fp32")
    per_slot = 2 * 2 * 16 * 4  # key and value, K, D, float32
    assert needed.ring_slots == {None: 100, 8: 12}
    assert needed.ring_bytes == (100 + 12 + 12) * per_slot
    # Both masks live at once; the scores are of one layer at a time, the widest counts.
    assert needed.activation_parts["attention"] == 4 * (100 + 12) + 4 * 4 * 100 * 4


def test_a_tied_embedding_is_counted_once_and_read_whole() -> None:
    tied = plan(tiny_spec(tie_word_embeddings=True), RING, "rtx", "fp16")
    untied = plan(tiny_spec(), RING, "rtx", "fp16")
    assert untied.weight_bytes - tied.weight_bytes == 320 * 64 * 2
    assert untied.step_bytes == tied.step_bytes


def test_a_ring_that_cannot_be_read_in_place_is_copied_at_every_token() -> None:
    spec = replace(MISTRAL_7B, layer_windows=(None,) * 32)
    short, long = (
        plan(spec, RingSpec(chunk=512, context=slots), "rtx", "fp16") for slots in (23_552, 24_064)
    )
    assert short.step_parts["moved"] == 0
    assert long.step_parts["moved"] == 2 * long.ring_bytes
    assert plan(spec, long.build.ring, "cuda", "fp16").step_parts["moved"] == 0


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("cpu", "fp16", r"--precision is 'fp16'; the target cpu takes fp32, int8wo, int4wo, int8"),
        ("rtx", "int3", r"--precision is 'int3'; the target rtx takes fp16, bf16"),
        ("tpu", "fp16", r"--target is 'tpu'; expected one of cpu, cuda, rtx, tensorrt"),
    ],
)
def test_a_precision_that_the_target_lacks_is_refused(
    target: str, precision: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        decide(MISTRAL_7B, target_named(target), BuildOptions(precision=precision))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_plan_and_export_accept_and_refuse_the_same_pairs(
    mistralc: Command, config_only: Path, tmp_path: Path, target: str, precision: str
) -> None:
    pair = ("--target", target, "--precision", precision)
    planned = mistralc("plan", config_only, *pair)
    exported = mistralc("export", config_only, "-o", tmp_path / "bundle", *pair)
    # Without weights no export gets far, but a wrong pair is refused before they are looked for.
    accepted = precision in TARGETS[target].activations
    assert planned.code == (0 if accepted else 2)
    assert exported.code == (1 if accepted else 2)
    if not accepted:
        assert planned.err == exported.err
        assert f"the target {target} takes" in exported.err


# On a GPU


def test_the_roofline_is_bandwidth_over_the_bytes_of_a_step() -> None:
    # One row of the embedding is read, the ring once, one slot is written.
    step = 14_483_464_192 - 2 * EMBEDDING + 603_979_776 + 131_072
    step += 2 * (32_000 + 32 * (18 * 4096 + 10 * 14_336))  # activations
    one = fit(of_7b(), GPUS["rtx4090"])
    assert one.tokens_per_s == pytest.approx(1008e9 / step, rel=1e-12)  # the same division
    assert round(one.tokens_per_s) == 68
    rows = fit(of_7b(ring=RingSpec(chunk=512, context=4096, max_batch=4)), GPUS["rtx4090"])
    weights = 14_483_464_192 - 2 * EMBEDDING
    four = 4 * 1008e9 / (weights + 4 * (step - weights))
    assert rows.tokens_per_s == pytest.approx(four, rel=1e-12)


def test_what_is_left_on_a_gpu_is_its_memory_less_model_and_reserve() -> None:
    needed = of_7b()
    one = fit(needed, GPUS["rtx4090"])
    assert needed.run_bytes == 14_483_464_192 + 603_979_776 + 153_354_240
    assert one.left_bytes == 24 * 10**9 - RUNTIME_RESERVE - needed.run_bytes
    assert one.fits


def test_sixteen_rows_of_a_7b_lack_memory_on_24_gb_and_fit_on_48() -> None:
    needed = of_7b(ring=RingSpec(chunk=512, context=4096, max_batch=16))
    small, large = fit(needed, GPUS["rtx4090"]), fit(needed, GPUS["l40s"])
    assert (small.fits, large.fits) == (False, True)
    assert needed.run_bytes == 14_483_464_192 + 16 * (603_979_776 + 153_354_240)
    assert small.left_bytes == 24 * 10**9 - RUNTIME_RESERVE - needed.run_bytes == -3_674_550_272
    assert small.refusal is None


def test_what_a_gpu_cannot_run_at_all_is_refused_with_the_way_out() -> None:
    hopper = fit(of_7b("rtx"), GPUS["h100"])
    assert not hopper.fits
    assert "9.0; use --target tensorrt" in str(hopper.refusal)
    assert fit(of_7b("tensorrt"), GPUS["h100"]).fits
    ampere = fit(of_7b("rtx", "fp8"), GPUS["rtx3090"])
    assert not ampere.fits
    assert "use --precision int8" in str(ampere.refusal)


# On the build host


def test_an_engine_needs_room_for_its_weights_beside_the_plan() -> None:
    needed = of_7b().host
    assert needed.disk_bytes == 2 * 14_483_464_192 + host.OTHER_FILES
    assert needed.bundle_bytes == 14_483_464_192 + host.OTHER_FILES
    assert needed.largest.name == host.COMPILE
    assert needed.largest.in_child
    assert needed.memory_bytes == round(1.14 * 14_483_464_192) + 200_000_000
    assert needed.memory_bytes > 16_518_811_648, "what the bf16 build of this model peaked at"
    assert of_7b("cpu", "fp32").host.disk_bytes == 28_966_928_384 + host.OTHER_FILES


@pytest.mark.parametrize(
    ("target", "precision", "step", "measured"),
    [
        # peak anonymous bytes of an export of Mistral-7B's shapes, by benchmarks/export.py
        ("cpu", "int4wo", host.TRACE, 436_035_584),
        ("cpu", "int4wo", host.REFERENCE, 802_578_432),
        ("cpu", "int4wo", host.LOAD, 5_930_786_816),
        ("cpu", "int4wo", host.VERIFY, 6_151_254_016),
        ("cpu", "int4wo", host.GATE, 6_687_604_736),
        ("rtx", "bf16", host.COMPILE, 16_620_000_000),
        ("rtx", "int8wo", host.COMPILE, 8_022_000_000),
        ("rtx", "int4wo", host.COMPILE, 11_635_000_000),
    ],
)
def test_the_memory_of_each_step_is_what_was_measured(
    target: str, precision: str, step: str, measured: int
) -> None:
    needed = decide(MISTRAL_7B, TARGETS[target], BuildOptions(precision=precision))
    found = {one.name: one.memory_bytes for one in host.host_needs(needed).steps}
    assert found[step] == pytest.approx(measured, rel=0.1)  # a few constants for all models


@pytest.mark.parametrize("precision", ["int8wo", "int4wo"])
def test_a_7b_can_be_exported_in_4_and_8_bits_on_24_gib(precision: str) -> None:
    needed = of_7b("cpu", precision).host
    assert needed.memory_bytes < 12 * 2**30
    assert needed.mapped_bytes == 14_483_464_192
    assert needed.passes == 3  # writing, the reference's answers, the gate
    assert [step.name for step in needed.steps] == [
        host.TRACE, host.REFERENCE, host.LOAD, host.VERIFY, host.GATE, host.HASH,
    ]  # fmt: skip


def test_weights_of_a_small_gguf_file_are_decoded_into_memory_and_of_a_large_one_are_not() -> None:
    decoded = WeightFacts(types=frozenset({"F32", "Q4_1"}))
    small, large = PRESETS["smol"], MISTRAL_7B
    extra = {
        spec: estimate(build_of(spec, RING, "cpu", "int8wo"), decoded).host.memory_bytes
        - plan(spec, RING, "cpu", "int8wo").host.memory_bytes
        for spec in (small, large)
    }
    assert extra[small] == 4 * small.num_parameters
    assert extra[large] < 4 * large.num_parameters / 10


def test_a_host_with_room_is_not_refused(tmp_path: Path) -> None:
    build = build_of(tiny_spec(), RING, "rtx", "fp16")
    require_host(build, tmp_path / "not" / "yet" / "there", BuildOptions())


def test_a_full_disk_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12, 8_123_456_789)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    size = f"{2 * 14_483_464_192 + host.OTHER_FILES:,}"
    with pytest.raises(MistralcError, match=f"{size} bytes of disk.*8,123,456,789") as refused:
        require_host(of_7b().build, tmp_path / "bundle", BuildOptions())
    assert "int4wo (8,001,050,624 bytes)" in str(refused.value)
    assert "int8wo" not in str(refused.value), "its 14.8 GB do not fit either"


def test_a_host_without_the_memory_is_told_the_step_and_the_precisions_that_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    monkeypatch.setattr(refusal, "memory_available", lambda: 24 * 2**30)
    build = of_7b("cpu", "fp32").build
    needs = {name: of_7b("cpu", name).host.memory_bytes for name in ("fp32", "int8wo", "int4wo")}
    assert needs["fp32"] > 28_966_928_384, "ONNX Runtime holds all weights in memory"
    with pytest.raises(MistralcError) as refused:
        require_host(build, tmp_path / "bundle", BuildOptions(precision="fp32"))
    message = str(refused.value)
    assert f"needs about {needs['fp32']:,} bytes of memory (for the step: Verifying)" in message
    assert f"{24 * 2**30:,} bytes are available" in message
    assert message.endswith(
        f"use a --precision that fits: int8wo ({needs['int8wo']:,} bytes), "
        f"int4wo ({needs['int4wo']:,} bytes)."
    )
    monkeypatch.setattr(refusal, "memory_available", lambda: 4 * 10**9)
    with pytest.raises(MistralcError, match="smaller model: int4wo needs the least of the others"):
        require_host(build, tmp_path / "bundle", BuildOptions(precision="fp32"))
    monkeypatch.setattr(refusal, "memory_available", lambda: None)  # a kernel that does not say
    require_host(build, tmp_path / "bundle", BuildOptions(precision="fp32"))


def test_the_precision_that_is_named_keeps_the_users_other_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusal, "memory_available", lambda: 24 * 2**30)
    options = BuildOptions(precision="fp32", window=1000, max_batch=2)
    build = decide(MISTRAL_7B, TARGETS["cpu"], options)
    with pytest.raises(MistralcError, match="use a --precision that fits: int8wo"):
        require_host(build, tmp_path / "bundle", options)
