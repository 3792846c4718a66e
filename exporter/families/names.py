"""Names and row order of the canonical weights in each checkpoint format. Reads no files.

Canonical is Hugging Face's form: rotary embedding rotates the pair (j, j + D/2) of a head, which
is the *half-split* order. Mistral's own files, GGUF's `llama` and what llama.cpp converts like a
Llama rotate the pair (2j, 2j + 1), the *interleaved* order (mistral-inference `rope.py`; Su et al.
2021, arXiv:2104.09864). With D=6 the rows of one head of q_proj or k_proj are stored as

    half-split     0 1 2 3 4 5
    interleaved    0 3 1 4 2 5

Values and outputs are not rotated, so only these two projections differ.
"""

import re
from collections.abc import Mapping

from exporter.families.family import Format, StoredAs
from graphs.spec import ModelSpec

_MISTRAL: Mapping[str, str] = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
_GGUF: Mapping[str, str] = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GGUF_POST_NORMS: Mapping[str, str] = {
    **_GGUF,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def named(spec: ModelSpec, kind: Format, name: str) -> StoredAs:
    """Return where a weight is stored by families that differ from Llama in no name."""
    return _stored(spec, kind, name, interleaved=kind != "huggingface")


def named_half_split(spec: ModelSpec, kind: Format, name: str) -> StoredAs:
    """As `named`, for families whose GGUF files have Hugging Face's order of rows."""
    return _stored(spec, kind, name, interleaved=False)


def _stored(spec: ModelSpec, kind: Format, name: str, *, interleaved: bool) -> StoredAs:
    heads = rotated_heads(spec, name) if interleaved else None
    return StoredAs(name=stored_name(name, kind, spec), interleaved_heads=heads)


def stored_name(name: str, kind: Format, spec: ModelSpec) -> str:
    """Translate a canonical name to the one in a file of this format."""
    if kind == "mistral":
        return _rename(name, _MISTRAL, "layers")
    if kind == "gguf":
        return _rename(name, _GGUF_POST_NORMS if spec.post_norms else _GGUF, "blk")
    return name


def rotated_heads(spec: ModelSpec, name: str) -> int | None:
    """Return the number of heads in the rows of a weight or bias that is rotated, otherwise None.

    Families that rotate some layers only have the same order of rows in all of them.
    """
    module = name.rpartition(".")[0]
    if module.endswith("self_attn.q_proj"):
        return spec.num_attention_heads
    if module.endswith("self_attn.k_proj"):
        return spec.num_key_value_heads
    return None


def _rename(name: str, names: Mapping[str, str], layers: str) -> str:
    stem, _, leaf = name.rpartition(".")  # the leaf is `weight` or `bias`
    match = _LAYER.fullmatch(stem)
    if match is None:
        return f"{names[stem]}.{leaf}"
    return f"{layers}.{match[1]}.{names[match[2]]}.{leaf}"
