"""Merge adapters into a checkpoint's weights, as peft's `merge_and_unload` does.

A merged weight is computed when it is read and has the type of the base weight: `b a` is computed
in float32, added in float32, and rounded once (peft, `tuners/lora/layer.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from exporter.checkpoint.adapters.read import Adapter, Change
from exporter.checkpoint.stored import TORCH_FLOATS, StoredTensor, map_tensor
from exporter.checkpoint.weight_source import WeightSource, float_source
from graphs.errors import MistralcError
from graphs.spec import EMBEDDING, HEAD, ModelSpec

AT_ONCE = 1 << 22  # values that are merged at once: 16 MiB in float32, which the heap keeps


def merged(
    sources: Mapping[str, WeightSource], adapters: Sequence[Adapter], *, tied: bool
) -> dict[str, WeightSource]:
    """Return the weights with all adapters merged, one after another.

    `tied` says that the checkpoint's output layer is its embedding. What an adapter adds to one of
    two tied weights is then added to both, and a copy that it brings is no longer tied.

    Raises MistralcError if an adapter changes a weight that the base does not have, or one of
    another shape.
    """
    result = dict(sources)
    for adapter in adapters:
        if tied and _unties(adapter):
            result[HEAD] = result[EMBEDDING]
            tied = False
        # What was saved replaces the base weight before anything is added, as peft loads it first.
        for name, change in adapter.changes.items():
            if change.replacement is not None:
                at = EMBEDDING if tied and name == HEAD else name
                if at in result:
                    result[at] = float_source(change.replacement)
        for name, change in adapter.changes.items():
            at = EMBEDDING if tied and name == HEAD else name
            base = result.get(at)
            if base is None:
                raise MistralcError(
                    f"The adapter {adapter.path} changes {name}, which the checkpoint does not "
                    f"have. {_advice(adapter)}"
                )
            result[at] = _changed(base, change, adapter)
    return result


def resized(spec: ModelSpec, adapters: Sequence[Adapter]) -> ModelSpec:
    """Return the spec with the vocabulary of adapters that bring an embedding of another size.

    An embedding or output layer that is a copy of its own is no longer tied.
    """
    for adapter in adapters:
        for name in (EMBEDDING, HEAD):
            change = adapter.changes.get(name)
            if change is not None and change.replacement is not None:
                spec = replace(spec, vocab_size=change.replacement.shape[0])
        if _unties(adapter):
            spec = replace(spec, tie_word_embeddings=False)
    return spec


def _unties(adapter: Adapter) -> bool:
    return any(
        name in (EMBEDDING, HEAD) and change.apart for name, change in adapter.changes.items()
    )


def _advice(adapter: Adapter) -> str:
    named = f", {adapter.base}" if adapter.base else ""
    return f"Use the base model that the adapter was trained on{named}."


def _changed(base: WeightSource, change: Change, adapter: Adapter) -> WeightSource:
    _check_shapes(base, change, adapter)
    if change.a is None and change.row_values is None:
        return base

    def read_rows(start: int, stop: int) -> Tensor:
        stored = base.rows(start, stop).read()
        weight = torch.empty_like(stored)
        step = max(1, AT_ONCE // max(1, stored[:1].numel()))
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            at = slice(begin - start, end - start)
            weight[at] = _rows(stored[at], change, begin, end)
        return weight

    return WeightSource(
        name=base.name,
        shape=base.shape,
        dtype=base.dtype if base.dtype in TORCH_FLOATS else "float32",
        ranges=(*base.ranges, *(one.where for one in change.tensors)),
        read_rows=read_rows,
    )


def _rows(stored: Tensor, change: Change, begin: int, end: int) -> Tensor:
    """Merge rows `begin` to `end` of a weight; returns them in float32."""
    weight = stored
    if change.a is not None and change.b is not None:
        a, b = map_tensor(change.a).float(), map_tensor(change.b).float()
        delta = (b @ a[:, begin:end]).T if change.embedding else b[begin:end] @ a
        weight = delta.mul_(change.scaling).add_(stored)
        if change.magnitude is not None:
            norm = torch.linalg.norm(weight, dim=1)
            wanted = map_tensor(change.magnitude).float().flatten()[begin:end]
            weight = (wanted / norm).unsqueeze(1) * weight
    if change.row_values is not None:
        weight = weight.to(torch.float32, copy=True)
        values = map_tensor(change.row_values).float()
        for row, value in zip(change.rows, values, strict=True):
            if begin <= row < end:
                weight[row - begin] = value
    return weight


def _check_shapes(base: WeightSource, change: Change, adapter: Adapter) -> None:
    rows, columns = base.shape[0], base.shape[-1]
    expected = {
        "lora_A": (change.a, rows if change.embedding else columns, -1),
        "lora_B": (change.b, columns if change.embedding else rows, 0),
        "lora_magnitude_vector": (change.magnitude, columns if change.embedding else rows, -1),
        "trainable_tokens_delta": (change.row_values, columns, -1),
    }
    for part, (tensor, size, axis) in expected.items():
        if tensor is not None and tensor.shape[axis] != size:
            raise _unfit(base, tensor, part, adapter)
    if any(row >= rows for row in change.rows):
        raise MistralcError(
            f"The adapter {adapter.path} replaces row {max(change.rows)} of {base.name}, which has "
            f"{rows} rows. {_advice(adapter)}"
        )


def _unfit(base: WeightSource, tensor: StoredTensor, part: str, adapter: Adapter) -> MistralcError:
    return MistralcError(
        f"The adapter {adapter.path} has {part} of shape {list(tensor.shape)} for {base.name} of "
        f"shape {list(base.shape)}. {_advice(adapter)}"
    )
