"""How one canonical weight is obtained from a checkpoint's files. Knows no format's layout.

A reader of a format makes a source for every weight that its files hold. A family may then take
some of its rows, reorder them, or change their values. So what a file stores and what the decoder
computes with are joined in one place, and everything downstream asks the same questions: which
bytes is it computed from, can they be copied as they are, do they hold codes that fit a scheme?
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from exporter.checkpoint.quantized.value import Quantized
from exporter.checkpoint.stored import TORCH_FLOATS, ByteRange, StoredTensor, map_tensor
from graphs.quant_scheme import Scheme

DECODED_AT_ONCE = 1 << 22  # values; the temporaries of 4-byte integers then stay below 100 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Where a weight comes from and how it is read. N are its rows: output features, for a linear.

    `name` is the tensor's name in the files, `dtype` the name of what is stored: a key of
    `TORCH_FLOATS`, a GGUF block type, or a quantization method with all that changes the meaning of
    its bytes. `ranges` are the bytes that the weight is computed from; with `by_rows` each of them
    holds the rows one after another, in equal shares.

    `read_rows` returns rows as floats: in the stored type, or decoded exactly to float32.
    `verbatim` is the byte range that holds the weight as it is, None if it is computed. `scheme`
    and `read_codes` belong together: codes that can be carried over bit for bit. `input_scale`
    reads the static scale of an input that `scheme` rounds. `scales` is the type that holds scales
    and minimums as they are; `not_held` says why stored codes fit no scheme; `rounds_inputs` that
    the method rounds inputs while it computes, with scales that it does not store.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    ranges: tuple[ByteRange, ...]
    read_rows: Callable[[int, int], Tensor]  # (start, stop) -> [stop - start, ...]
    by_rows: bool = False
    verbatim: ByteRange | None = None
    scheme: Scheme | None = None
    read_codes: Callable[[int, int], Quantized] | None = None  # (start, stop) -> those rows
    input_scale: Callable[[], float] | None = None
    scales: str = "float32"
    not_held: str = ""
    rounds_inputs: bool = False
    readable: bool = True  # whether the values mean something to us: `read_rows` may be called

    @property
    def quantized(self) -> tuple[Scheme, Callable[[], Quantized]] | None:
        """The scheme that stores the weight's codes, and a function that reads them all."""
        if self.scheme is None or self.read_codes is None:
            return None
        return self.scheme, self._all_codes

    @property
    def path(self) -> Path:
        """The file that holds the weight, or the first of them."""
        return self.ranges[0].path

    @property
    def nbytes(self) -> int:
        """Bytes of the files that the weight is computed from."""
        return sum(where.length for where in self.ranges)

    def read(self) -> Tensor:
        """Return the whole weight: memory-mapped if it is verbatim, otherwise a copy.

        Stored floats keep their type. Anything else is decoded to float32, a few rows at a time.
        """
        count = self.shape[0]
        if self.dtype in TORCH_FLOATS:
            return self.read_rows(0, count)
        weight = torch.empty(self.shape)
        step = max(1, DECODED_AT_ONCE // max(1, weight[:1].numel()))
        for start in range(0, count, step):
            stop = min(start + step, count)
            weight[start:stop] = self.read_rows(start, stop)
        return weight

    def rows(self, start: int, stop: int) -> "WeightSource":
        """Return the source of rows `start` to `stop`, such as one part of a fused projection."""
        count = self.shape[0]
        if not 0 <= start < stop <= count:
            raise ValueError(f"{self.name}: rows {start} to {stop} of {count}")
        if (start, stop) == (0, count):
            return self

        def share(where: ByteRange) -> ByteRange:
            size = where.length // count
            return replace(where, offset=where.offset + start * size, length=(stop - start) * size)

        codes = self.read_codes
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            ranges=tuple(map(share, self.ranges)) if self.by_rows else self.ranges,
            verbatim=None if self.verbatim is None else share(self.verbatim),
            read_rows=lambda a, b: self.read_rows(start + a, start + b),
            read_codes=None if codes is None else lambda a, b: codes(start + a, start + b),
        )

    def half_split(self, heads: int) -> "WeightSource":
        """Return the source with the rows of `heads` heads in half-split order.

        The stored order is interleaved: see `exporter/families/names.py`.
        """
        size = self.shape[0] // heads  # rows of a head, D
        order = torch.arange(size).view(-1, 2).T.flatten()  # [D]: 0 2 4 … 1 3 5 …
        codes = self.read_codes

        def whole_heads(start: int, stop: int) -> tuple[int, int, Tensor]:
            """The stored rows of all heads that are touched, and where the wanted ones lie."""
            first, last = start // size, -(-stop // size)
            index = (torch.arange(last - first)[:, None] * size + order).flatten()
            return first * size, last * size, index[start - first * size : stop - first * size]

        def read_rows(start: int, stop: int) -> Tensor:
            begin, end, index = whole_heads(start, stop)
            return self.read_rows(begin, end)[index]

        def read_codes(start: int, stop: int) -> Quantized:
            begin, end, index = whole_heads(start, stop)
            if codes is None:
                raise ValueError(f"{self.name} has no codes")
            return codes(begin, end).rows(index)

        return replace(
            self,
            read_rows=read_rows,
            by_rows=False,
            verbatim=None,
            read_codes=None if codes is None else read_codes,
        )

    def changed(self, change: Callable[[Tensor], Tensor]) -> "WeightSource":
        """Return the source with `change` applied to its values, row by row, in float32."""
        return replace(
            self,
            read_rows=lambda start, stop: change(self.read_rows(start, stop).float()),
            verbatim=None,
            scheme=None,
            read_codes=None,
            input_scale=None,
        )

    def _all_codes(self) -> Quantized:
        if self.read_codes is None:
            raise ValueError(f"{self.name} has no codes")
        return self.read_codes(0, self.shape[0])


def float_source(stored: StoredTensor) -> WeightSource:
    """Return the source of a tensor that is stored in one of `TORCH_FLOATS`."""
    return WeightSource(
        name=stored.name,
        shape=stored.shape,
        dtype=stored.where.dtype,
        ranges=(stored.where,),
        read_rows=lambda start, stop: map_tensor(stored)[start:stop],
        by_rows=True,
        verbatim=stored.where,
    )


def unreadable_source(stored: StoredTensor) -> WeightSource:
    """Return the source of a tensor of a type that holds no weights by itself, such as I32."""

    def read_rows(start: int, stop: int) -> Tensor:
        raise ValueError(f"{stored.name} is of type {stored.where.dtype}: rows {start} to {stop}")

    return WeightSource(
        name=stored.name, shape=stored.shape, dtype=stored.where.dtype, ranges=(stored.where,),
        read_rows=read_rows, readable=False,
    )  # fmt: skip
