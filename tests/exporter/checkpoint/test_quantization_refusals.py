"""Quantizations that are not read, and parts that do not fit, are refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.checkpoint.open import open_checkpoint, read_spec
from graphs.errors import MistralcError
from tests.exporter.checkpoint.edits import edit_json, edit_weights, refusal
from tests.support.make_checkpoint import write_checkpoint
from tests.support.quantized_forms import FORMS, SPEC, Form, float8, write_form

Q_PROJ = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]


def named(name: str) -> Form:
    return next(form for form in FORMS if form.name == name)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "hqq"}, "quantized as hqq; expected one of AWQ, GPTQ"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"bits": 4}, "quantized as None"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
         "packed as marlin; expected one of gptq, gptq_v2"),
        ({"quant_method": "gptq", "bits": 5, "group_size": 128}, "`bits` is 5"),
        ({"quant_method": "gptq", "bits": 4}, "`group_size` is missing"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
         "packed as gemv; expected gemm"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {
            "targets": ["Linear"], "format": "nvfp4-pack-quantized"}}}, "nvfp4-pack-quantized"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"},
          "config_groups": {"a": {"targets": ["Linear"]}}}, "sparse weights"),
        ({"quant_method": "fp8", "activation_scheme": "other"}, "static or dynamic"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "two numbers"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4"),
        ({"quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
    ],
)  # fmt: skip
def test_a_quantization_that_is_not_read_is_refused_by_name(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path, SPEC, dtype="float16")
    edit_json(path / "config.json", lambda data: data.update(quantization_config=config))
    assert said in refusal(path)


def test_the_configuration_alone_is_enough_to_refuse_a_method(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, SPEC, dtype="float16")
    edit_json(
        path / "config.json", lambda data: data.update(quantization_config={"quant_method": "x"})
    )
    (path / "model.safetensors").unlink()
    with pytest.raises(MistralcError, match="quantized as x"):
        read_spec(path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"qformat_weight": "int8"}, "fp8_e4m3"),
        ({"qformat_weight": "fp8_e4m3", "qscheme_act": "CHANNEL"}, "TENSOR or NO_SCALES"),
    ],
)
def test_settings_of_mistrals_files_are_checked(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path, SPEC, dtype="float16", format="mistral")
    edit_json(path / "params.json", lambda data: data.update(quantization=config))
    assert said in refusal(path)


def drop(part: str) -> Callable[[Tensors], None]:
    def change(weights: Tensors) -> None:
        del weights[f"{Q_PROJ}.{part}"]

    return change


def put(part: str, value: Tensor) -> Callable[[Tensors], None]:
    def change(weights: Tensors) -> None:
        weights[f"{Q_PROJ}.{part}"] = value

    return change


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("AWQ", drop("scales"), "lacks model.layers.0.self_attn.q_proj.scales"),
        ("AWQ", put("scales", torch.ones(4, 64).half()), "has shape [4, 64]; expected [4, 128]"),
        ("AWQ", put("qzeros", torch.ones(4, 16)), "is of type float32; expected I32 or U32"),
        ("AWQ", put("qzeros", torch.ones(4, 8).int()), "expected [4, 16]"),
        ("GPTQ symmetric", drop("qzeros"), "lacks"),
        ("GPTQ symmetric", put("qzeros", torch.ones(4, 8).int()), "expected [4, 16]"),
        ("GPTQ symmetric", put("scales", torch.ones(4, 8).half()), "expected [4, 128]"),
        ("GPTQ act-order", put("g_idx", torch.full((128,), 9).int()), "names the group 9"),
        ("GPTQ act-order", put("g_idx", torch.zeros(5).int()), "expected [128]"),
        ("FP8 static", put("weight_scale_inv", torch.ones(3)), "expected one scale"),
        ("FP8 in blocks", put("weight_scale_inv", torch.ones(3, 2)), "expected [1, 1]"),
        ("FP8 static", put("weight", torch.ones(128, 128)), "is of type float32"),
        ("ModelOpt INT4 AWQ", put("weight_scale", torch.ones(128, 3)), "expected [128, 2]"),
        ("bitsandbytes nf4", drop("weight.absmax"), "lacks"),
        ("bitsandbytes nf4", put("weight.absmax", torch.ones(7)), "expected 256 blocks of 64"),
        ("bitsandbytes nf4", put("weight.quant_map", torch.ones(7)), "16 values"),
        ("bitsandbytes nf4", put("weight", torch.ones(7, 1, dtype=torch.uint8)), "two to a byte"),
        ("bitsandbytes nf4", put("weight.quant_state.bitsandbytes__nf4",
                                 torch.ones(7, dtype=torch.uint8)), "JSON with the shape"),
        ("bitsandbytes nf4, doubly quantized", put("weight.nested_quant_map", torch.ones(7)),
         "256 values"),
        ("bitsandbytes int8", put("SCB", torch.ones(7)), "expected [128]"),
        ("MLX 4 bits", drop("biases"), "lacks"),
        ("MLX 4 bits", put("scales", torch.ones(128, 7).half()), "expected [128, 2]"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_named(
    form: str, change: Callable[[Tensors], None], said: str, tmp_path: Path
) -> None:
    path = write_form(tmp_path, named(form)).path
    edit_weights(path, change)
    message = refusal(path)
    assert said in message
    assert "q_proj" in message


def test_a_quantized_weight_of_another_shape_than_the_model_is_refused(tmp_path: Path) -> None:
    path = write_form(tmp_path, named("AWQ")).path
    edit_json(path / "config.json", lambda data: data.update(intermediate_size=512))
    assert "expected [512, 128]" in refusal(path)


def test_codes_without_a_configuration_are_refused(tmp_path: Path) -> None:
    path = write_form(tmp_path, named("AWQ")).path
    edit_json(path / "config.json", lambda data: data.pop("quantization_config"))
    assert "lacks the tensor" in refusal(path)


def test_a_bias_of_zeros_changes_nothing_and_any_other_is_refused(tmp_path: Path) -> None:
    path = write_form(tmp_path, named("GPTQ symmetric")).path
    assert f"{Q_PROJ}.bias" in load_file(path / "model.safetensors")
    open_checkpoint(path)
    edit_weights(path, put("bias", torch.ones(128)))
    assert f"a tensor {Q_PROJ}.bias" in refusal(path)


def test_scales_of_a_quantized_cache_are_ignored(tmp_path: Path) -> None:
    path = write_form(tmp_path, named("FP8 static")).path
    scales = {f"model.layers.0.self_attn.{part}": torch.tensor(1.0)
              for part in ("k_scale", "k_proj.k_scale", "v_proj.v_scale")}  # fmt: skip
    edit_weights(path, lambda weights: weights.update(scales))
    open_checkpoint(path)


def test_linears_that_a_method_leaves_as_floats_stay_floats(tmp_path: Path) -> None:
    form = named("AWQ")
    path = write_form(tmp_path, form).path
    plain = load_file(write_checkpoint(tmp_path / "f", SPEC, dtype="float16") / "model.safetensors")

    def change(weights: Tensors) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del weights[f"{Q_PROJ}.{part}"]
        weights[f"{Q_PROJ}.weight"] = plain[f"{Q_PROJ}.weight"]

    edit_weights(path, change)
    opened = open_checkpoint(path)
    assert opened.stored[f"{Q_PROJ}.weight"].verbatim is not None
    assert opened.dtypes[f"{Q_PROJ}.weight"] == "float16"


def test_the_fingerprint_covers_settings_and_every_part(tmp_path: Path) -> None:
    path = write_form(tmp_path, named("GPTQ asymmetric")).path
    seen = {open_checkpoint(path).fingerprint()}
    for part in ("qweight", "qzeros", "scales"):
        edit_weights(
            path, lambda weights, part=part: weights[f"{Q_PROJ}.{part}"].view(-1)[:1].add_(1)
        )
        seen.add(open_checkpoint(path).fingerprint())
    settings = {"checkpoint_format": "gptq_v2"}
    edit_json(path / "config.json", lambda data: data["quantization_config"].update(settings))
    seen.add(open_checkpoint(path).fingerprint())
    assert len(seen) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_scales_of_powers_of_two_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    make = partial(float8, names=("weight_scale_inv", None), block=128)
    form = replace(named("FP8 in blocks"), make=make)
    written = write_form(tmp_path, form)
    tensors = load_file(written.path / "model.safetensors")
    name = f"{Q_PROJ}.weight"
    exponent = torch.tensor([[121]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_file(tensors | {f"{Q_PROJ}.weight_scale_inv": exponent},
              written.path / "model.safetensors")  # fmt: skip
    codes = tensors[name].float()
    assert torch.equal(open_checkpoint(written.path).tensor(name), codes * 2.0**-6)


def test_an_index_may_spread_the_parts_of_a_weight_over_files(tmp_path: Path) -> None:
    path = write_form(tmp_path, named("AWQ")).path
    whole = open_checkpoint(path)
    expected, fingerprint = {name: whole.tensor(name) for name in whole.stored}, whole.fingerprint()
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    where = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    opened = open_checkpoint(path)
    for name, weight in expected.items():
        assert torch.equal(opened.tensor(name), weight)
    assert opened.fingerprint() == fingerprint
