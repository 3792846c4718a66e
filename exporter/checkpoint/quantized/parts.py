"""The stored tensors of one quantized module, and the source of its weight. Knows no method."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import StoredTensor, map_tensor
from exporter.checkpoint.weight_source import WeightSource
from graphs.errors import MistralcError
from graphs.quant_scheme import Scheme

Tensors = Mapping[str, StoredTensor]
ReadCodes = Callable[[int, int], Quantized]
WORDS = ("I32", "U32")
FLOAT_TYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """The tensors of the module `name`, by what follows its name: `qweight`, `weight_scale`."""

    name: str
    tensors: Tensors

    def get(self, part: str, *kinds: str) -> StoredTensor | None:
        """Return a part if the module has it; raises MistralcError if it is of another type."""
        return self.part(part, *kinds) if part in self.tensors else None

    def part(self, part: str, *kinds: str) -> StoredTensor:
        """Return a part. Raises MistralcError if it is missing, or of none of these types."""
        found = self.tensors.get(part)
        if found is None:
            some = next(iter(self.tensors.values()))
            raise MistralcError(
                f"{some.where.path} has {some.name} and lacks {self.name}.{part}; expected both, "
                "parts of one quantized weight. Download the checkpoint again."
            )
        if kinds and found.where.dtype not in kinds:
            raise MistralcError(
                f"{found.where.path}: {found.name} is of type {found.where.dtype}; expected "
                f"{' or '.join(kinds)}, as the quantization configuration says. Use the "
                "configuration and weights of one checkpoint."
            )
        return found

    def first(self, *parts: str) -> str | None:
        """Return the first of these parts that the module has."""
        return next((part for part in parts if part in self.tensors), None)

    def unfit(self, part: str, expected: str) -> MistralcError:
        """Return the error for a part of the wrong shape, for the caller to raise."""
        found = self.part(part)
        return MistralcError(
            f"{found.where.path}: {found.name} has shape {list(found.shape)}; expected {expected}. "
            "Use the configuration and weights of one checkpoint."
        )

    def source(
        self,
        label: str,
        shape: tuple[int, int],
        parts: list[str],
        *,
        scheme: Scheme | None,
        read: ReadCodes | Callable[[int, int], Tensor],
        why: str = "",
        input_scale: Callable[[], float] | None = None,
        scales: str = "float32",
        rounds_inputs: bool = False,
    ) -> WeightSource:
        """Return the source of the module's weight [N, K].

        `read` returns codes of `scheme`, or floats where no scheme holds the codes; `why` says why.
        """
        held = scheme is not None

        def read_rows(start: int, stop: int) -> Tensor:
            found = read(start, stop)
            return found.dequantized() if isinstance(found, Quantized) else found

        def read_codes(start: int, stop: int) -> Quantized:
            found = read(start, stop)
            if not isinstance(found, Quantized):
                raise TypeError(f"{self.name} has no codes")
            return found

        return WeightSource(
            name=f"{self.name}.weight", shape=shape, dtype=label,
            ranges=tuple(self.tensors[part].where for part in parts),
            read_rows=read_rows, scheme=scheme, read_codes=read_codes if held else None,
            input_scale=input_scale, not_held=why, scales=scales,
            rounds_inputs=rounds_inputs,
        )  # fmt: skip


def modules(found: Tensors, part: str) -> Iterator[Module]:
    """Yield every module that has a tensor of this name directly after its own."""
    owners: dict[str, dict[str, StoredTensor]] = {
        name.removesuffix("." + part): {} for name in found if name.endswith("." + part)
    }
    for name, tensor in found.items():
        for at, letter in enumerate(name):
            if letter == "." and name[:at] in owners:
                owners[name[:at]][name[at + 1 :]] = tensor
    for name, tensors in owners.items():
        yield Module(name=name, tensors=tensors)


def scalar(stored: StoredTensor) -> Callable[[], float]:
    """Return a function that reads the only number of a tensor."""
    return lambda: float(map_tensor(stored).flatten()[0].float())


def per_block(scale: Tensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
    """Repeat a scale for one tensor, for rows, or for blocks of rows: float32 [n, J].

    `scale` is [], [1], [N], [N, J] or [A, J], where each of the A rows serves a whole block of
    rows; `rows` [n] are the wanted rows of a weight of `shape` [N, K].
    """
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).expand(len(rows), 1)
    if scale.dim() == 1:
        scale = scale[:, None]
    if scale.shape[0] != shape[0]:
        size = -(-shape[0] // scale.shape[0])
        rows = rows // size
    return scale[rows].float()


def row_numbers(start: int, stop: int) -> Tensor:
    """Return the numbers of rows `start` to `stop`."""
    return torch.arange(start, stop)
