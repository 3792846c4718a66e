"""Fuzz the configurations and weights that `mistralc export` opens, without tokenizers."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from exporter.checkpoint import gguf_file
from exporter.checkpoint.open import open_checkpoint, read_spec
from exporter.checkpoint.stored import TORCH_FLOATS
from exporter.decide import decide
from exporter.estimate.model import estimate
from exporter.options import BuildOptions
from graphs.spec import ModelSpec
from graphs.targets import target_named
from tests.reliability.harness.damage import Draw, Place, damaged_bytes, damaged_json
from tests.reliability.harness.target import Files, Folder, Prepared, Target
from tests.support.make_checkpoint import Format, tiny_spec, write_checkpoint

PREAMBLE = 8  # bytes in front of a safetensors header, holding its length


def small_spec(**overrides: Any) -> ModelSpec:
    """A spec of a few kilobytes; its vocabulary is too small for a tokenizer."""
    small = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "head_dim": 8, "window": 8}  # fmt: skip
    return tiny_spec(**(small | overrides))


def _configuration(name: str, kind: Format) -> Callable[[Path], Prepared]:
    def prepare(folder: Path) -> Prepared:
        path = write_checkpoint(folder / "model", small_spec(), format=kind)
        for weights in path.glob("*.safetensors"):
            weights.unlink()
        good = json.loads((path / name).read_bytes())
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
        richer = good | {"rope_scaling": scaling, "layer_types": ["sliding_attention"]}
        seeds = [good, richer] if kind == "huggingface" else [good]
        cases = st.sampled_from(seeds).flatmap(damaged_json).map(lambda data: {name: data})
        return Prepared(cases=cases, read=Folder(path).reader(_read_spec))

    return prepare


def _read_spec(path: Path) -> None:
    """Read a configuration and plan with it, as `mistralc plan` does."""
    spec = read_spec(path)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    needed = estimate(decide(spec, target_named("cpu"), BuildOptions()))
    assert needed.weight_bytes > 0


def _read_weights(path: Path) -> None:
    """Open a checkpoint and read every tensor, as an export does."""
    opened = open_checkpoint(path)
    for name, shape in opened.spec.weight_shapes().items():
        stored = opened.stored[name]
        for where in stored.ranges:
            inside = where.offset + where.length <= where.path.stat().st_size
            assert inside, f"{name} extends beyond the end of its file"
        assert tuple(opened.tensor(name).shape) == shape, name
        if stored.dtype in TORCH_FLOATS:
            assert stored.nbytes == math.prod(shape) * TORCH_FLOATS[stored.dtype].itemsize
    assert len(opened.fingerprint()) == 64


def _safetensors(folder: Path) -> Prepared:
    path = write_checkpoint(folder / "model", small_spec())
    name = "model.safetensors"
    data = (path / name).read_bytes()
    length = int.from_bytes(data[:PREAMBLE], "little")
    header, body = data[PREAMBLE : PREAMBLE + length], data[PREAMBLE + length :]
    tree = json.loads(header)

    @st.composite
    def cases(draw: Draw) -> Files:
        if draw(st.booleans()):
            return {name: draw(damaged_bytes(data, [(0, PREAMBLE)]))}
        text = draw(damaged_json(tree))
        said = len(text) + draw(st.sampled_from((0, 0, 0, 0, 1, -1, 2**40)))
        rest = draw(st.sampled_from((body, body, body, b"", body * 2, body[:-1])))
        return {name: (said % 2**64).to_bytes(PREAMBLE, "little") + text + rest}

    return Prepared(cases=cases(), read=Folder(path).reader(_read_weights))


def _sharded(folder: Path) -> Prepared:
    path = write_checkpoint(folder / "model", small_spec(), shard_size=8_000)
    name = "model.safetensors.index.json"
    index = damaged_json(json.loads((path / name).read_bytes())).map(lambda data: {name: data})
    shards = {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}
    shard = st.sampled_from(sorted(shards)).flatmap(
        lambda one: damaged_bytes(shards[one], [(0, PREAMBLE)]).map(lambda data: {one: data})
    )
    return Prepared(cases=index | shard, read=Folder(path).reader(_read_weights))


class _Recording(gguf_file._Cursor):
    """A cursor that records the offset and width of every number in a header."""

    places: list[Place]

    def values(self, code: str, count: int = 1) -> tuple[Any, ...]:
        if count == 1:
            self.places.append((self.position, struct.calcsize(f"<{code}")))
        return super().values(code, count)


def gguf_places(path: Path) -> list[Place]:
    """The places of counts, lengths, types, offsets and scalar values in a GGUF header."""
    cursor = _Recording(path, path.read_bytes())  # type: ignore[arg-type]  # bytes work like a memory map here
    cursor.places = []
    tensors, keys = gguf_file._preamble(cursor)
    for _ in range(keys):
        gguf_file._pair(cursor)
    for _ in range(tensors):
        gguf_file._info(cursor)
    return cursor.places


def _gguf(folder: Path) -> Prepared:
    path = write_checkpoint(folder, small_spec(), format="gguf")
    data, places = path.read_bytes(), gguf_places(path)
    header = places[-1][0] + places[-1][1]

    @st.composite
    def cases(draw: Draw) -> Files:
        if draw(st.integers(0, 5)) == 5:
            return {path.name: draw(damaged_bytes(data, places))}
        return {path.name: draw(damaged_bytes(data[:header], places)) + data[header:]}

    return Prepared(
        cases=cases(), read=Folder(folder).reader(lambda it: _read_weights(it / path.name))
    )


def gguf_bytes(metadata: Mapping[str, Any]) -> bytes:
    """A GGUF file with metadata only; values that the format cannot represent are left out."""
    entries = [
        _text(key) + value for key, value in ((k, _value(v)) for k, v in metadata.items()) if value
    ]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries)


def _value(value: Any) -> bytes:
    kind, data = _scalar(value)
    if kind is not None:
        return struct.pack("<I", kind) + data
    if not isinstance(value, list):
        return b""
    items = [_scalar(item) for item in value]
    kinds = {one for one, _ in items}
    if len(kinds) != 1 or None in kinds:
        return b""
    head = struct.pack("<IIQ", gguf_file._ARRAY, kinds.pop() or 0, len(items))
    return head + b"".join(written for _, written in items)


def _scalar(value: Any) -> tuple[int | None, bytes]:
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return 11, (value % 2**64).to_bytes(8, "little")
        case float():
            return 12, struct.pack("<d", value)
        case str():
            return gguf_file._STRING, _text(value)
    return None, b""


def _text(value: str) -> bytes:
    data = value.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(data)) + data


TARGETS = (
    Target(name="config.json", prepare=_configuration("config.json", "huggingface"), examples=150),
    Target(name="params.json", prepare=_configuration("params.json", "mistral"), examples=100),
    Target(name="safetensors", prepare=_safetensors, examples=150),
    Target(name="safetensors index and shards", prepare=_sharded),
    Target(name="GGUF", prepare=_gguf, examples=200),
)
