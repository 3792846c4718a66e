"""Every family against the class of transformers that defines it, in float32 and eager.

The checkpoints are those that transformers writes. Texts are up to five windows long; the ring of
the decoder is as small as a bundle's, so that it wraps.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporter.checkpoint.open import Checkpoint, open_checkpoint, read_spec
from exporter.decoder.load import load_decoder
from exporter.decoder.model import Decoder
from exporter.families.catalogue import FAMILIES
from graphs import window
from graphs.errors import MistralcError
from graphs.rope import Rope
from graphs.spec import ModelSpec, Multipliers, RingSpec
from tests.support import families, tiny

TOLERANCE = 1e-5
"""Share of the largest logit. Another order of summation changes it by up to 1.2e-6; the smallest
part that is left out below, by 1e-3."""
CHUNK = 5

Opened = dict[str, Checkpoint]


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Every example as a checkpoint, opened."""
    folder = tmp_path_factory.mktemp("families")
    return {
        name: open_checkpoint(families.write(folder / str(number), name))
        for number, name in enumerate(families.EXAMPLES)
    }


def decoder_of(checkpoint: Checkpoint, spec: ModelSpec, length: int) -> Decoder:
    """The decoder for a text of this length, which chooses the factors of LongRoPE."""
    if spec.rope_scaling is not None:
        spec = replace(spec, rope_scaling=spec.rope_scaling.for_context(length))
    return load_decoder(spec, checkpoint.tensor)


def in_a_ring(decoder: Decoder, ids: tiny.Ids) -> Tensor:
    """Logits [n, V] of the text in chunks, over rings that hold a window and a chunk."""
    spec, text = decoder.spec, torch.from_numpy(ids)[None]
    ring = RingSpec(chunk=CHUNK, context=len(ids))
    sizes = [ring.capacity(size) for size in spec.layer_windows]
    heads, dim = spec.num_key_value_heads, spec.head_dim
    past = [torch.full((1, heads, size, dim), 7.0) for size in sizes for _ in range(2)]
    found, at = [], 0
    with torch.inference_mode():
        for count in window.pieces(0, len(ids), CHUNK, set(sizes)):
            positions = torch.arange(at, at + count)[None]
            logits, past = decoder(
                text[:, at : at + count], positions, torch.arange(count)[None], past
            )
            found.append(logits[0])
            at += count
    return torch.cat(found)


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    largest = expected.abs().max()
    assert largest > 1, "the comparison needs logits that are not close to zero"
    return float((got - expected).abs().max() / largest)


LENGTHS = [(name, n) for name, one in families.EXAMPLES.items() for n in one.lengths]


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_logits_are_those_of_transformers(opened: Opened, name: str, length: int) -> None:
    checkpoint = opened[name]
    assert checkpoint.family.name == families.EXAMPLES[name].family
    assert any(checkpoint.spec.windows) is (name.endswith(", window") or name == "gemma2")
    ids = tiny.tokens(checkpoint.spec, length)
    expected = families.logits(name, ids.tolist())
    decoder = decoder_of(checkpoint, checkpoint.spec, length)
    assert difference(torch.from_numpy(tiny.at_once(decoder, ids)), expected) <= TOLERANCE
    assert difference(in_a_ring(decoder, ids), expected) <= TOLERANCE


def test_every_family_is_compared() -> None:
    compared = {one.family for one in families.EXAMPLES.values()}
    assert compared == {family.name for family in FAMILIES}


def test_what_a_family_needs_of_a_target_is_what_its_models_have(opened: Opened) -> None:
    capped = {one.family.name for one in opened.values() if one.spec.attention.softcap is not None}
    assert capped == {one.name for one in FAMILIES if "caps_scores" in one.needs} == {"gemma2"}


WITHOUT: dict[str, Any] = {
    "rope_scaling": None, "rope": Rope(), "multipliers": Multipliers(), "activation": "silu",
    "logit_softcap": None,
}  # fmt: skip
OF_ATTENTION: dict[str, Any] = {"scale": None, "softcap": None}


def parts(spec: ModelSpec) -> dict[str, ModelSpec]:
    """The spec without each of its parts that need no other weights."""
    found = {
        name: replace(spec, **{name: value})
        for name, value in WITHOUT.items()
        if getattr(spec, name) != value
    }
    for name, value in OF_ATTENTION.items():
        if getattr(spec.attention, name) != value:
            found[name] = replace(spec, attention=replace(spec.attention, **{name: value}))
    for name, value in {"query_scale": 0.0, "layers_without": (), "features": None}.items():
        if getattr(spec.rope, name) != value and spec.rope_scaling is None:
            found[name] = replace(spec, rope=replace(spec.rope, **{name: value}))
    return found


@pytest.mark.parametrize(
    "name", ["ministral3", "llama 3", "qwen2, tied, yarn", "phi3, longrope", "gemma2", "granite",
             "smollm3"],
)  # fmt: skip
def test_every_part_changes_the_logits(opened: Opened, name: str) -> None:
    checkpoint, length = opened[name], families.EXAMPLES[name].lengths[-1]
    without = parts(checkpoint.spec)
    assert without, "this family has parts that Mistral lacks"
    ids = tiny.tokens(checkpoint.spec, length)
    expected = families.logits(name, ids.tolist())
    for part, spec in without.items():
        decoder = decoder_of(checkpoint, spec, length)
        got = torch.from_numpy(tiny.at_once(decoder, ids))
        assert difference(got, expected) > 100 * TOLERANCE, f"{part} changes nothing"


# The text part of models with images


IMAGES = ("mistral3", "mistral3, ministral3")


@pytest.mark.parametrize("name", IMAGES)
def test_the_vision_tower_is_named_and_left_out(opened: Opened, name: str) -> None:
    """The names are those of published files, which transformers writes again."""
    assert opened[name].left_out == ("multi_modal_projector", "vision_tower")
    assert all(one.name.startswith("language_model.") for one in opened[name].stored.values())


def test_names_as_transformers_5_has_its_modules_are_read_too(
    opened: Opened, tmp_path: Path
) -> None:
    path = families.write(tmp_path, "mistral3")
    weights = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("language_model.lm_head", "lm_head")
        .replace("vision_tower.", "model.vision_tower."): weight
        for name, weight in load_file(path / "model.safetensors").items()
    }
    save_file(weights, path / "model.safetensors")
    checkpoint, published = open_checkpoint(path), opened["mistral3"]
    assert checkpoint.left_out == ("model.vision_tower", "multi_modal_projector")
    assert checkpoint.spec == published.spec
    for name in checkpoint.spec.weight_shapes():
        assert torch.equal(checkpoint.tensor(name), published.tensor(name))


def test_without_an_output_layer_the_embedding_of_the_text_part_is_tied(tmp_path: Path) -> None:
    path = families.write(tmp_path, "mistral3")
    weights = load_file(path / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, path / "model.safetensors")
    assert open_checkpoint(path).spec.tie_word_embeddings
    assert not read_spec(path).tie_word_embeddings


def test_mistrals_own_form_of_ministral_3(opened: Opened, tmp_path: Path) -> None:
    """The same weights under Mistral's names, interleaved, with a vision encoder beside them."""
    checkpoint = opened["ministral3"]
    spec = checkpoint.spec
    weights = {"vision_encoder.ln_pre.weight": torch.ones(4), "patch_merger.w": torch.ones(4)}
    short = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1",
             "down_proj": "w2", "up_proj": "w3"}  # fmt: skip
    for name in spec.weight_shapes():
        weight, heads = checkpoint.tensor(name), 0
        at = name.replace("model.", "").replace("self_attn", "attention")
        at = at.replace("mlp", "feed_forward").replace("embed_tokens", "tok_embeddings")
        at = at.replace("input_layernorm", "attention_norm").replace("lm_head", "output")
        at = at.replace("post_attention_layernorm", "ffn_norm")
        for long, own in short.items():
            at = at.replace(long, own)
        if ".wq." in at or ".wk." in at:
            heads = len(weight) // spec.head_dim
            weight = weight.view(heads, 2, spec.head_dim // 2, -1).transpose(1, 2).flatten(0, 2)
        weights[at] = weight.contiguous()
    save_file(weights, tmp_path / "consolidated.safetensors")
    scaling = spec.rope_scaling
    assert scaling is not None
    trained = scaling.original_max_position_embeddings
    params = {
        "dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2,
        "norm_eps": spec.rms_norm_eps, "vocab_size": families.VOCABULARY,
        "rope_theta": spec.rope_theta, "tied_embeddings": False, "max_position_embeddings": 256,
        "yarn": {"factor": scaling.factor, "original_max_position_embeddings": trained,
                 "beta": scaling.beta_fast, "alpha": scaling.beta_slow, "apply_scale": True},
        "llama_4_scaling": {"original_max_position_embeddings": trained, "beta": 0.3},
        "vision_encoder": {"hidden_size": 4},
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(params))
    native = open_checkpoint(tmp_path)
    assert native.left_out == ("patch_merger", "vision_encoder")
    ids = tiny.tokens(spec, 120)
    # With `apply_scale`, cosines and sines are multiplied as in the paper; there is no `mscale`.
    paper = replace(scaling, attention_factor=0.1 * math.log(scaling.factor) + 1)
    assert native.spec == replace(spec, rope_scaling=paper)
    same = replace(native.spec, rope_scaling=scaling)
    got = torch.from_numpy(tiny.at_once(decoder_of(native, same, 120), ids))
    assert difference(got, families.logits("ministral3", ids.tolist())) <= TOLERANCE


# What is refused


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen2", {"max_window_layers": -1, "use_sliding_window": True}, "max_window_layers"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window` is null"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias"),
    ("ministral3", {"rope_parameters": families.YARN}, "llama_4_scaling_beta"),
    ("phi3", {"partial_rotary_factor": 1.5}, "at most 1"),
    ("phi3, longrope", {"partial_rotary_factor": 0.5}, "8 factors|8 rotated"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("granite", {"sliding_window": 12}, "GraniteForCausalLM ignores"),
    ("granite", {"logits_scaling": 0}, "logits_scaling"),
    ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers"),
    ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_settings_that_no_decoder_computes_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    values = families.config(name) | changes
    if "partial_rotary_factor" in changes:
        del values["rope_parameters"]["partial_rotary_factor"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(MistralcError, match=message):
        read_spec(tmp_path)


def test_a_window_that_no_text_leaves_is_none(opened: Opened) -> None:
    """Phi-3.5 has a window of 262,144 tokens and a context of 131,072."""
    written = families.config("phi3, longrope")
    assert written["sliding_window"] > written["max_position_embeddings"]
    assert opened["phi3, longrope"].spec.windows == (None,)
