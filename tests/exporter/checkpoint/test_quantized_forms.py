"""Checkpoints that are quantized already: read exactly, codes carried over bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import torch

from exporter.bundle import weights_file
from exporter.checkpoint.open import open_checkpoint
from exporter.decide import decide
from exporter.options import BuildOptions
from exporter.quantization.carry import describe_carried
from exporter.quantization.make_recipe import make_recipe, weight_facts
from exporter.quantization.packing import unpack
from graphs.quant_scheme import groups, stored_parts
from graphs.targets import TARGETS
from tests.support import compressed_tensors_forms
from tests.support.quantized_forms import FORMS, INPUT_SCALE, SPEC, Form, Written, write_form

ALL = (*FORMS, *compressed_tensors_forms.FORMS)
LINEARS = [name for group in groups(SPEC) for name in group.readers]
Write = Callable[[Form], Written]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write a form once for all tests."""
    done: dict[str, Written] = {}

    def written(form: Form) -> Written:
        if form in compressed_tensors_forms.FORMS:
            pytest.importorskip("compressed_tensors", reason="the library writes these forms")
        if form.name not in done:
            done[form.name] = write_form(tmp_path_factory.mktemp("form") / "model", form)
        return done[form.name]

    return written


def named(name: str) -> Form:
    return next(form for form in ALL if form.name == name)


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)
def test_a_form_is_read_as_its_own_library_reads_it(form: Form, write: Write) -> None:
    written = write(form)
    opened = open_checkpoint(written.path)
    assert opened.spec == SPEC
    for name, made in written.made.items():
        source = opened.stored[name]
        # Products of a scale and a code are exact in float32, sums with a minimum are rounded once.
        assert (source.read() - made.weight).abs().max() <= 3e-7 * made.weight.abs().max(), name
        assert torch.equal(source.rows(5, 21).read(), source.read()[5:21]), name
        assert (source.quantized is None) == (made.codes is None), source.not_held
        if source.quantized is None:
            assert source.not_held
            continue
        scheme, read = source.quantized
        codes = read()
        assert codes.scheme == scheme
        assert made.codes is not None
        assert torch.equal(codes.codes.view(torch.uint8), made.codes.view(torch.uint8)), name
        part = source.rows(5, 21).quantized
        assert part is not None
        assert torch.equal(part[1]().dequantized(), codes.dequantized()[5:21])


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.name)
def test_a_bundle_has_the_codes_of_the_checkpoint_bit_for_bit(
    form: Form, write: Write, tmp_path: Path
) -> None:
    written = write(form)
    opened = open_checkpoint(written.path)
    facts = weight_facts(opened)
    build = decide(opened.spec, TARGETS["cpu"], BuildOptions(), facts)
    assert build.precision.name == (form.precision or "fp32")
    assert set(build.storage.copied) >= set(LINEARS if form.precision else [])
    recipe = make_recipe(build, opened, None)
    weights_file.stream_weights(opened, recipe, tmp_path)
    with safetensors.safe_open(tmp_path / weights_file.FILE_NAME, "pt") as file:
        for name, made in written.made.items():
            scheme = recipe.schemes.get(name)
            if scheme is None:
                assert torch.equal(file.get_tensor(name), opened.tensor(name)), name
                continue
            shape, layout = SPEC.weight_shapes()[name], recipe.layout(name)
            parts = stored_parts(name, shape, scheme, recipe.activation, layout)
            got = unpack([file.get_tensor(part.name) for part in parts], shape, scheme, layout)
            if name in build.storage.copied:
                assert made.codes is not None
                assert torch.equal(got.codes.view(torch.uint8), made.codes.view(torch.uint8)), name
                difference = (got.dequantized() - made.weight).abs().max()
                assert difference <= 4e-7 * made.weight.abs().max(), name
    for scale in recipe.tensors.values():
        assert float(scale) == pytest.approx(INPUT_SCALE)
    told = describe_carried(build, facts.codes)
    counted = [int(line.split()[0]) for line in told if line[0].isdigit()]
    assert sum(counted) == len(written.made)
    assert any("carried over bit for bit" in line for line in told) == bool(form.precision)


@pytest.mark.parametrize(
    ("form", "cuda", "rtx"),
    [
        ("AWQ", "int4wo", "fp16"), ("GPTQ symmetric", "int4wo", "int4wo"),
        ("GPTQ asymmetric", "int4wo", "fp16"), ("GPTQ act-order", "fp16", "fp16"),
        ("GPTQ, one group", "int4wo", "int4wo"), ("GPTQ 8 bits", "int8wo", "fp16"),
        ("FP8 static", "fp16", "fp8"), ("GPTQ v2", "int4wo", "fp16"),
        ("FP8, Mistral's own", "fp16", "fp8"), ("ModelOpt INT4 AWQ", "int4wo", "int4wo"),
        ("bitsandbytes int8", "int8wo", "int8wo"), ("MLX 4 bits", "int4wo", "fp16"),
        ("compressed-tensors w4a16 symmetric", "int4wo", "int4wo"),
        ("compressed-tensors w8a8 static", "int8wo", "int8"),
        ("compressed-tensors w8a8 dynamic", "int8wo", "int8wo"),
        ("compressed-tensors float8 dynamic", "fp16", "fp8"),
    ],
)  # fmt: skip
def test_each_target_takes_the_precision_that_carries_the_codes(
    form: str, cuda: str, rtx: str, write: Write
) -> None:
    opened = open_checkpoint(write(named(form)).path)
    facts = weight_facts(opened)
    for target, precision in (("cuda", cuda), ("rtx", rtx), ("tensorrt", rtx)):
        build = decide(opened.spec, TARGETS[target], BuildOptions(), facts)
        assert build.precision.name == precision
        told = "\n".join(describe_carried(build, facts.codes))
        if precision == "fp16":
            assert not build.storage.copied
            assert "dequantized exactly and rounded to float16: " in told
        else:
            assert set(LINEARS) <= set(build.storage.copied)
            assert "dequantized" not in told or form.startswith("MLX")


def test_weights_that_fit_no_scheme_stay_floats_beside_those_that_do(write: Write) -> None:
    opened = open_checkpoint(write(named("FP8 in blocks")).path)
    facts = weight_facts(opened)
    build = decide(opened.spec, TARGETS["rtx"], BuildOptions(), facts)
    assert build.precision.name == "fp8"
    one_scale = {name for name in LINEARS if "down" not in name}  # for a row: 128 columns
    assert set(build.storage.schemes) == set(build.storage.copied) == one_scale
    lost = [line for line in describe_carried(build, facts.codes) if "dequantized" in line]
    (told,) = lost
    assert told.startswith("2 weights")
    assert "rounded to float16: TensorRT-RTX has no form for these codes" in told


def test_another_precision_dequantizes_exactly_and_says_so(write: Write) -> None:
    opened = open_checkpoint(write(named("AWQ")).path)
    facts = weight_facts(opened)
    build = decide(opened.spec, TARGETS["cpu"], BuildOptions(precision="int8wo"), facts)
    assert build.storage.copied == ()
    assert describe_carried(build, facts.codes) == [
        "14 weights of awq 4 bits, group 32: dequantized exactly and rounded to int8",
        "the output layer: rounded to int8 (--keep lm_head stores it as it is)",
    ]
    whole = decide(opened.spec, TARGETS["cpu"], BuildOptions(precision="fp32"), facts)
    assert describe_carried(whole, facts.codes) == [
        "14 weights of awq 4 bits, group 32: dequantized exactly and stored as float32"
    ]


def test_static_scales_of_inputs_make_calibration_unnecessary(write: Write) -> None:
    opened = open_checkpoint(write(named("FP8 static")).path)
    build = decide(opened.spec, TARGETS["rtx"], BuildOptions(), weight_facts(opened))
    recipe = make_recipe(build, opened, None)
    for name in LINEARS:
        assert recipe.input_scale(name) == pytest.approx(INPUT_SCALE)


def test_the_largest_scale_of_a_group_rounds_its_input(write: Write, tmp_path: Path) -> None:
    form = named("FP8 static")
    steps = iter(range(1, 100))

    def make(weight: torch.Tensor) -> object:
        made = form.make(weight)
        scale = {"activation_scale": torch.tensor(float(next(steps)))}
        return replace(made, tensors={**made.tensors, **scale})

    opened = open_checkpoint(write_form(tmp_path, replace(form, make=make)).path)
    build = decide(opened.spec, TARGETS["cpu"], BuildOptions(), weight_facts(opened))
    recipe = make_recipe(build, opened, None)
    # q, k, v are the first three linears of a layer, then o, gate, up, down.
    assert recipe.input_scale("model.layers.0.self_attn.k_proj.weight") == 3
    assert recipe.input_scale("model.layers.0.self_attn.o_proj.weight") == 4
    assert recipe.input_scale("model.layers.1.mlp.gate_proj.weight") == 13
