"""Phi-3, Phi-3.5 and Phi-4: fused projections, LongRoPE, rotation of a part of each head.

transformers: models/phi3. `qkv_proj` holds the rows of q_proj, k_proj and v_proj one after another,
`gate_up_proj` those of gate_proj and up_proj.
"""

import re

from exporter.families.config import read_common, window_of, windows_of
from exporter.families.family import Family, Format, StoredAs
from exporter.families.names import stored_name
from exporter.families.rotary import read_rotary
from exporter.fields import Fields
from graphs.spec import ModelSpec

_ORIGINAL = 4096  # `original_max_position_embeddings` of Phi3Config
_FUSED = re.compile(r"(.+\.)(q|k|v|gate|up)_proj\.weight")
_GGUF_FUSED = {"qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up"}


def read_config(fields: Fields) -> ModelSpec:
    """Read a `config.json`."""
    whole = {"original_max_position_embeddings": _ORIGINAL, **fields.values}
    filled = Fields(whole, fields.origin)
    spec = read_common(
        filled,
        windows_of(fields, window_of(fields)),
        kv_heads=fields.integer("num_attention_heads"),
        rotary=read_rotary(filled, partial=True),
    )
    return spec.within(spec.max_position_embeddings)  # Phi-3.5: a window of 262,144 in 131,072


def tensors(spec: ModelSpec, kind: Format, name: str) -> StoredAs:
    """Return the rows of a fused projection, or the tensor of the same name."""
    match = _FUSED.fullmatch(name)
    if match is None:
        return StoredAs(name=stored_name(name, kind, spec))
    at, part = match[1], match[2]
    shapes = spec.weight_shapes()
    parts = ("q", "k", "v") if part in ("q", "k", "v") else ("gate", "up")
    before = parts[: parts.index(part)]
    start = sum(shapes[f"{at}{one}_proj.weight"][0] for one in before)
    fused = "qkv_proj" if part in ("q", "k", "v") else "gate_up_proj"
    stored = f"{at}{fused}.weight"
    if kind == "gguf":
        stored = f"blk.{name.split('.')[2]}.{_GGUF_FUSED[fused]}.weight"
    return StoredAs(name=stored, rows=(start, start + shapes[name][0]))


def read_gguf(_: Fields, spec: ModelSpec) -> ModelSpec:
    """Remove a window that no text leaves; the rest is read for every architecture."""
    return spec.within(spec.max_position_embeddings)


PHI3 = Family(
    name="phi3",
    title="Phi-3 mini and medium, Phi-3.5 mini, Phi-4, Phi-4 mini",
    adds="fused projections; LongRoPE; a part of each head rotated; a window",
    architectures=("Phi3ForCausalLM",),
    read_config=read_config,
    tensors=tensors,
    gguf_names=("phi3",),
    read_gguf=read_gguf,
    rotates_parts=True,
)
