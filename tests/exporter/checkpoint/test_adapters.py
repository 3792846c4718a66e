"""Merging PEFT adapters: the same weights as peft's `merge_and_unload`, and true refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from exporter.checkpoint.open import Checkpoint, open_checkpoint, read_spec
from graphs.errors import MistralcError, UsageError
from tests.support import families, quantized_forms
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

pytest.importorskip("peft")
from tests.support import adapters


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = tiny_spec(window=8, tie_word_embeddings=request.param, vocab_size=64)
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", spec)


def same_weights(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Assert that every weight has the bits of the merged model's."""
    expected = model.state_dict()
    assert checkpoint.spec.tie_word_embeddings == model.config.tie_word_embeddings
    for name, shape in checkpoint.spec.weight_shapes().items():
        got = checkpoint.tensor(name)
        assert tuple(got.shape) == shape == tuple(expected[name].shape), name
        assert got.dtype == expected[name].dtype, name
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize("form", adapters.FORMS)
def test_a_merged_checkpoint_has_the_bits_of_the_model_that_peft_merges(
    form: str, base: Path, tmp_path: Path
) -> None:
    options = adapters.FORMS[form]
    adapter = adapters.make(base, tmp_path / "adapter", options)
    checkpoint = open_checkpoint(base, [str(adapter)])
    same_weights(
        checkpoint, adapters.merge(base, [(adapter, 1.0)], resize=options.get("resize", 0))
    )
    assert read_spec(base, [str(adapter)]) == checkpoint.spec
    plain = open_checkpoint(base)
    assert checkpoint.fingerprint() != plain.fingerprint()
    changed = [n for n in plain.spec.weight_shapes() if checkpoint.spec == plain.spec
               and not torch.equal(checkpoint.tensor(n), plain.tensor(n))]  # fmt: skip
    assert changed or checkpoint.spec != plain.spec


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once_as_peft_does(dtype: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "model", tiny_spec(window=8), dtype=dtype)
    stored = getattr(torch, dtype)
    for form in ("LoRA", "DoRA"):
        adapter = adapters.make(base, tmp_path / form, adapters.FORMS[form], dtype=stored)
        merged = adapters.merge(base, [(adapter, 1.0)], dtype=stored)
        same_weights(open_checkpoint(base, [str(adapter)]), merged)


def test_adapters_are_merged_in_order_with_their_weights(base: Path, tmp_path: Path) -> None:
    paths = [
        adapters.make(base, tmp_path / str(i), adapters.FORMS[form], seed=i)
        for i, form in enumerate(("LoRA", "rsLoRA"))
    ]
    given = [f"{paths[0]}=0.5", f"{paths[1]}=-2"]
    checkpoint = open_checkpoint(base, given)
    same_weights(checkpoint, adapters.merge(base, [(paths[0], 0.5), (paths[1], -2.0)]))
    other = open_checkpoint(base, [f"{paths[0]}=0.25", f"{paths[1]}=-2"])
    assert other.fingerprint() != checkpoint.fingerprint()


def test_rows_are_merged_a_few_at_a_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapters.make(base, tmp_path / "adapter", adapters.FORMS["DoRA"])
    whole = open_checkpoint(base, [str(adapter)])
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = whole.tensor(name)
    monkeypatch.setattr("exporter.checkpoint.adapters.merge.AT_ONCE", 3 * expected.shape[1])
    torch.testing.assert_close(whole.tensor(name), expected, rtol=0, atol=1e-7)
    assert torch.equal(whole.stored[name].rows(5, 9).read(), whole.tensor(name)[5:9])


@pytest.mark.parametrize("kind", ["mistral", "gguf"])
def test_an_adapter_fits_a_base_in_any_format(kind: str, tmp_path: Path) -> None:
    spec = tiny_spec(window=8)
    base = write_checkpoint(tmp_path / "hf", spec)
    other = write_checkpoint(tmp_path / kind, spec, format=kind)
    adapter = adapters.make(base, tmp_path / "adapter", adapters.FORMS["LoRA"])
    expected, found = (open_checkpoint(one, [str(adapter)]) for one in (base, other))
    for name in spec.weight_shapes():
        assert torch.equal(expected.tensor(name), found.tensor(name)), name


@pytest.mark.parametrize("name", ["phi3", "gemma2", "qwen2"])
def test_fused_projections_and_other_norms_are_merged_before_they_are_taken_apart(
    name: str, tmp_path: Path
) -> None:
    base = families.write(tmp_path / "base", name)
    options = {"target_modules": "all-linear", "modules_to_save": ["input_layernorm"]}
    adapter = adapters.make(base, tmp_path / "adapter", options)
    adapters.merge(base, [(adapter, 1.0)]).save_pretrained(tmp_path / "merged")
    got, expected = open_checkpoint(base, [str(adapter)]), open_checkpoint(tmp_path / "merged")
    for weight in expected.spec.weight_shapes():
        assert torch.equal(got.tensor(weight), expected.tensor(weight)), weight


def test_an_adapter_is_added_to_the_exact_values_of_a_quantized_base(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "hf", quantized_forms.SPEC)
    adapter = adapters.make(base, tmp_path / "adapter", adapters.FORMS["LoRA"])
    name = "model.layers.0.self_attn.q_proj.weight"
    change = open_checkpoint(base, [str(adapter)]).tensor(name) - open_checkpoint(base).tensor(name)
    awq = next(form for form in quantized_forms.FORMS if form.name == "AWQ")
    quantized = quantized_forms.write_form(tmp_path / "awq", awq).path
    plain, merged = open_checkpoint(quantized), open_checkpoint(quantized, [str(adapter)])
    assert plain.stored[name].scheme is not None
    assert merged.stored[name].scheme is None
    assert merged.dtypes[name] == "float32"
    torch.testing.assert_close(merged.tensor(name) - plain.tensor(name), change, rtol=0, atol=1e-6)


def test_an_adapters_directory_finds_its_base(base: Path, tmp_path: Path) -> None:
    adapter = adapters.make(base, tmp_path / "adapter", adapters.FORMS["LoRA"])
    alone, named = open_checkpoint(adapter), open_checkpoint(base, [str(adapter)])
    assert alone.fingerprint() == named.fingerprint()
    assert alone.source == str(adapter)
    _edit(adapter, base_model_name_or_path="mistralai/Mistral-7B-v0.1")
    with pytest.raises(MistralcError, match=f"Mistral-7B-v0.1, which is neither a path.*{adapter}"):
        open_checkpoint(adapter)


def test_the_tokenizer_that_lies_beside_an_adapter_is_read(base: Path, tmp_path: Path) -> None:
    adapter = adapters.make(base, tmp_path / "adapter", adapters.FORMS["resized"])
    assert open_checkpoint(base, [str(adapter)]).text == base
    (adapter / "tokenizer.json").write_text("{}")
    assert open_checkpoint(base, [str(adapter)]).text == adapter


def test_an_adapter_beside_full_weights_has_to_be_asked_for(base: Path, tmp_path: Path) -> None:
    adapter = adapters.make(base, tmp_path / "adapter", adapters.FORMS["LoRA"])
    both = tmp_path / "both"
    shutil.copytree(base, both)
    for file in adapter.iterdir():
        shutil.copy(file, both)
    with pytest.raises(MistralcError, match=r"holds a checkpoint and an adapter.*--lora"):
        open_checkpoint(both)
    expected = open_checkpoint(base, [str(adapter)])
    assert open_checkpoint(both, [str(both)]).fingerprint() == expected.fingerprint()


def _edit(adapter: Path, **values: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "`peft_type` is IA3; expected LORA"),
        ({"use_qalora": True}, "`use_qalora` is true, which mistralc does not merge"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication`"),
        ({"bias": "all"}, "`bias` is"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
        ({"r": 8}, "the rank of .* is 8; its weights have rank 4"),
        ({"lora_alpha": "many"}, "`lora_alpha` is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_lora_is_refused_by_name(
    base: Path, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    adapter = adapters.make(base, tmp_path / "adapter", {"target_modules": ["q_proj"]})
    _edit(adapter, **values)
    with pytest.raises(MistralcError, match=message):
        open_checkpoint(base, [str(adapter)])


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapters.make(base, tmp_path / "adapter", adapters.FORMS["LoRA"])
    smaller = tiny_spec(num_hidden_layers=1)
    shallow = write_checkpoint(tmp_path / "shallow", smaller)
    with pytest.raises(MistralcError, match=r"changes model\.layers\.1\..*does not have"):
        open_checkpoint(shallow, [str(adapter)])
    narrow = write_checkpoint(tmp_path / "narrow", tiny_spec(intermediate_size=64, window=8))
    with pytest.raises(MistralcError, match=r"of shape .* for .* of shape .*trained on"):
        open_checkpoint(narrow, [str(adapter)])


@pytest.mark.parametrize("given", ["={}", "{}=0", "{}=nan", "{}=x"])
def test_a_weight_that_is_no_number_is_refused(base: Path, tmp_path: Path, given: str) -> None:
    with pytest.raises(UsageError, match="expected ADAPTER or ADAPTER=WEIGHT"):
        open_checkpoint(base, [given.format(tmp_path / "adapter")])


def test_a_weight_for_an_adapter_that_replaces_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapters.make(base, tmp_path / "adapter", adapters.FORMS["norms saved"])
    with pytest.raises(UsageError, match=r"replaces .*input_layernorm"):
        open_checkpoint(base, [f"{adapter}=0.5"])


def test_no_adapter_and_no_weights_are_told_apart(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MistralcError, match="There is no adapter at"):
        open_checkpoint(base, [str(base)])
    adapter = adapters.make(base, tmp_path / "adapter", adapters.FORMS["LoRA"])
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(MistralcError, match=r"adapter_model\.bin, which mistralc does not read"):
        open_checkpoint(base, [str(adapter)])
