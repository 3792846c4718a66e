"""Write random-weight checkpoints of real shapes in any format, streamed.

    python tests/support/make_checkpoint.py --preset mistral-7b-v0.1 --dtype bf16 OUT

Matrices are uniform with variance 1 / columns, so activations keep their scale and logits of a tiny
model have a standard deviation of about 1; norm weights are around 1. NumPy draws uniform values
nine times as fast as normal ones (0.5 against 0.055 billion per second and core): 15 s instead of
2 min for 7B. Values depend on the seed and the weight's name only, so all formats, dtypes and shard
sizes of a spec hold the same model.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import tokenizers
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run as a script

from exporter.families import names as weight_names
from graphs.spec import ModelSpec

Format = Literal["huggingface", "mistral", "gguf"]
Array = np.ndarray[Any, Any]

_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_CHUNK = 2**23  # values per draw: 32 MiB in float32
_SPECIALS = ("<unk>", "<s>", "</s>")
_SMALLEST_VOCABULARY = len(_SPECIALS) + 256
_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)


def tiny_spec(**overrides: Any) -> ModelSpec:
    """A model of 100,000 weights, GQA 4:2, full attention; `overrides` are fields of ModelSpec.

    `window=N` sets the window of every layer; otherwise give `layer_windows`.
    """
    layers = overrides.get("num_hidden_layers", 2)
    window = overrides.pop("window", None)
    values: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0, "layer_windows": (window,) * layers,
    }  # fmt: skip
    return ModelSpec(**(values | overrides))


PRESETS: Mapping[str, ModelSpec] = {
    "tiny": tiny_spec(),
    "smol": tiny_spec(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rope_theta=100_000.0,
        max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "mistral-7b-v0.1": tiny_spec(
        vocab_size=32_000, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=32_768, window=4096,
    ),
}  # fmt: skip


def write_checkpoint(
    directory: str | Path,
    spec: ModelSpec,
    *,
    dtype: str = "float32",
    format: Format = "huggingface",  # noqa: A002 - the name the readers use
    seed: int = 0,
    shard_size: int = 5 * 10**9,
) -> Path:
    """Write a checkpoint with random weights and return what `open_checkpoint` takes.

    That is `directory`, or the file `model.gguf` in it. Above `shard_size` bytes the weights are
    written as shards with an index (not in GGUF). A tokenizer is written if the vocabulary has room
    for 256 bytes and 3 special tokens. At most one drawn chunk is in memory.
    """
    folder, dtype = Path(directory), _SHORT.get(dtype, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "gguf":
        return _write_gguf(folder / "model.gguf", spec, dtype, seed)
    stem = "model" if format == "huggingface" else "consolidated"
    _write_shards(folder, stem, spec, dtype, seed, shard_size)
    if format == "huggingface":
        _write_json(folder / "config.json", hf_config(spec, dtype))
    else:
        _write_json(folder / "params.json", mistral_params(spec))
    write_tokenizer(folder, spec)
    return folder


def hf_config(spec: ModelSpec, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of a spec, as transformers 4 writes it; 5 reads it too."""
    windows = {size for size in spec.layer_windows if size is not None}
    if len(windows) > 1:
        raise ValueError("config.json has one sliding_window; write another format")
    mixed = windows and None in spec.layer_windows
    name = "Ministral" if mixed else "Mistral"
    config: dict[str, Any] = {
        "architectures": [f"{name}ForCausalLM"], "model_type": name.lower(),
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "torch_dtype": dtype,
        "sliding_window": next(iter(windows), None), "rope_scaling": _rope_scaling(spec),
    }  # fmt: skip
    if mixed:
        kinds = ("full_attention", "sliding_attention")
        config["layer_types"] = [kinds[size is not None] for size in spec.layer_windows]
    plain = spec.to_json()
    del plain["layer_windows"], plain["rope_scaling"]
    return config | plain


def _rope_scaling(spec: ModelSpec) -> dict[str, Any] | None:
    scaling = spec.rope_scaling
    if scaling is None:
        return None
    if scaling.rope_type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return dict(spec.to_json()["rope_scaling"])


def mistral_params(spec: ModelSpec) -> dict[str, Any]:
    """The `params.json` of a spec. It cannot express rotary scaling."""
    if spec.rope_scaling is not None:
        raise ValueError("params.json has no rotary scaling; write another format")
    window: Any = list(spec.layer_windows) if len(spec.windows) > 1 else spec.layer_windows[0]
    return {
        "dim": spec.hidden_size, "n_layers": spec.num_hidden_layers, "head_dim": spec.head_dim,
        "hidden_dim": spec.intermediate_size, "n_heads": spec.num_attention_heads,
        "n_kv_heads": spec.num_key_value_heads, "norm_eps": spec.rms_norm_eps,
        "vocab_size": spec.vocab_size, "rope_theta": spec.rope_theta, "sliding_window": window,
        "tied_embeddings": spec.tie_word_embeddings,
        "max_position_embeddings": spec.max_position_embeddings,
    }  # fmt: skip


# Weights


def chunks(spec: ModelSpec, name: str, seed: int) -> Iterator[Array]:
    """The float32 values of one weight in canonical order, in pieces of whole heads."""
    shape = spec.weight_shapes()[name]
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    draw = np.random.Generator(np.random.SFC64(int.from_bytes(key[:8], "little")))
    if len(shape) == 1:
        yield 1 + (draw.random(shape, dtype=np.float32) - 0.5) * np.float32(0.4)
        return
    rows, columns = shape
    step = max(1, _CHUNK // columns // spec.head_dim) * spec.head_dim
    for start in range(0, rows, step):
        values = draw.random((min(step, rows - start), columns), dtype=np.float32)
        values -= np.float32(0.5)
        values *= np.float32(math.sqrt(12 / columns))  # the variance of a unit interval is 1/12
        yield values


def _stored(
    spec: ModelSpec, name: str, seed: int, dtype: str, interleaved: bool
) -> Iterator[Array]:
    """The bytes of one weight as stored in a file, as uint8 arrays of whole rows."""
    heads = weight_names.rotated_heads(spec, name) if interleaved else None
    for values in chunks(spec, name, seed):
        weight = torch.from_numpy(values)
        if heads is not None:
            weight = to_interleaved(weight, weight.shape[0] // spec.head_dim)
        yield weight.to(_TORCH[dtype]).contiguous().view(torch.uint8).numpy()


def _write_shards(
    folder: Path, stem: str, spec: ModelSpec, dtype: str, seed: int, shard_size: int
) -> None:
    interleaved = stem == "consolidated"

    def rename(name: str) -> str:
        return weight_names.stored_name(name, "mistral" if interleaved else "huggingface", spec)

    shards = _divide(spec, dtype, shard_size)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = folder / f"{stem}{part}.safetensors"
        where |= {rename(name): file.name for name in names}
        shapes = {rename(name): spec.weight_shapes()[name] for name in names}
        with file.open("wb") as output:
            output.write(safetensors_header(shapes, dtype))
            for name in names:
                for data in _stored(spec, name, seed, dtype, interleaved):
                    output.write(data.data)
    if len(shards) > 1:
        total = spec.num_parameters * _TORCH[dtype].itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def _divide(spec: ModelSpec, dtype: str, shard_size: int) -> list[list[str]]:
    """Names by shard; a new shard starts where the next weight would exceed the size."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in spec.weight_shapes().items():
        size = math.prod(shape) * _TORCH[dtype].itemsize
        if shards[-1] and used + size > shard_size:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def safetensors_header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """The header of a safetensors file whose tensors follow in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * _TORCH[dtype].itemsize
        entries[name] = {
            "dtype": _SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [offset, end]
        }  # fmt: skip
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_gguf(path: Path, spec: ModelSpec, dtype: str, seed: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, spec)
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for name, shape in spec.weight_shapes().items():
        writer.add_tensor_info(
            weight_names.stored_name(name, "gguf", spec), shape,
            np.dtype(np.float16),  # any type but uint8 keeps the shape as given
            math.prod(shape) * _TORCH[dtype].itemsize,
            raw_dtype=gguf.GGMLQuantizationType[kind],
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in spec.weight_shapes().items():
        whole = np.empty(math.prod(shape) * _TORCH[dtype].itemsize, np.uint8)
        filled = 0
        for data in _stored(spec, name, seed, dtype, interleaved=True):
            whole[filled : filled + data.size] = data.ravel()
            filled += data.size
        writer.write_tensor_data(whole)
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, spec: ModelSpec) -> None:
    if len(spec.windows) > 1 or (spec.rope_scaling and spec.rope_scaling.rope_type != "linear"):
        raise ValueError("this GGUF writer has one window and linear scaling; write another format")
    writer.add_block_count(spec.num_hidden_layers)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_attention_heads)
    writer.add_head_count_kv(spec.num_key_value_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    if spec.layer_windows[0] is not None:
        writer.add_sliding_window(spec.layer_windows[0])
    if spec.rope_scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(spec.rope_scaling.factor)
    if spec.vocab_size > _SMALLEST_VOCABULARY:
        tokens = [*vocabulary(spec.vocab_size - 1), "qq"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["q q"])  # llama.cpp needs one
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in _SPECIALS else 1 for token in tokens])  # 3: control
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_bos_token(True)
        writer.add_chat_template(_CHAT)


# Tokenizer


def vocabulary(size: int) -> list[str]:
    """Special tokens, the 256 bytes in byte-level spelling, then made-up words.

    No text encodes to the words; they make every token that a random model generates readable.
    """
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġ{_word(number)}" for number in range(max(0, size - _SMALLEST_VOCABULARY)))
    return [*_SPECIALS, *letters, *words]


def _word(number: int) -> str:
    """0 is `ba`, 1 is `be`, and so on: syllables, at least two letters."""
    syllable = "bdfgklmnprstvz"[number // 5 % 14] + "aeiou"[number % 5]
    return (_word(number // 70 - 1) if number >= 70 else "") + syllable


def write_tokenizer(folder: Path, spec: ModelSpec) -> None:
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    if spec.vocab_size < _SMALLEST_VOCABULARY:
        return
    ids = {token: number for number, token in enumerate(vocabulary(spec.vocab_size))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(list(_SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
         "eos_token": "</s>", "clean_up_tokenization_spaces": False, "chat_template": _CHAT},
    )  # fmt: skip


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Command line


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], text[-2:].upper()) if text[-2:].upper() in units else (text, "")
    return int(float(number) * units.get(unit, 1))


def to_half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of [heads * D, E] from interleaved to half-split; returns a new tensor."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)  # [heads, D/2, 2, E]
    return pairs.transpose(1, 2).reshape(rows, columns)


def to_interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of [heads * D, E] from half-split to interleaved: the inverse."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)  # [heads, 2, D/2, E]
    return halves.transpose(1, 2).reshape(rows, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random-weight checkpoint.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--dtype", choices=_SHORT, default="fp32")
    parser.add_argument("--format", choices=("huggingface", "mistral", "gguf"),
                        default="huggingface")  # fmt: skip
    parser.add_argument("--shard-size", type=_bytes, default="5GB", help="such as 500MB or 5GB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="number of layers (default: the preset's)")
    parser.add_argument("--window", type=int, help="sliding window of every layer; 0 for none")
    args = parser.parse_args()
    spec = PRESETS[args.preset]
    if args.layers is not None:
        windows = spec.layer_windows[:1] * args.layers
        spec = replace(spec, num_hidden_layers=args.layers, layer_windows=windows)
    if args.window is not None:
        spec = replace(spec, layer_windows=(args.window or None,) * spec.num_hidden_layers)
    path = write_checkpoint(
        args.out, spec, dtype=_SHORT[args.dtype], format=args.format, seed=args.seed,
        shard_size=args.shard_size,
    )  # fmt: skip
    print(f"{path}: {spec.num_parameters:,} weights in {args.dtype}")


if __name__ == "__main__":
    main()
