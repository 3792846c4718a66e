"""The windows of text that calibration looks at, and how far they reach. Knows no method."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphs.errors import UsageError
from graphs.spec import ModelSpec

TOKENS = 16384  # of all samples together: 32 windows of 512
LENGTH = 512  # tokens of a window
BEYOND = 4  # a sliding model's samples are longer than its window by this share of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Windows of token ids, int64 [n, S], and where they are from, as plain data."""

    ids: Tensor
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over the ids and their shape."""
        ids = self.ids.contiguous()
        return hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.numpy().tobytes()).hexdigest()

    def coverage(self, spec: ModelSpec) -> list[dict[str, Any]]:
        """For each distinct window, how many tokens lie beyond it, where keys are forgotten."""
        count, length = self.ids.shape
        return [
            {"window": size, "tokens": count * length,
             "beyond": 0 if size is None else count * max(0, length - size)}
            for size in spec.windows
        ]  # fmt: skip


def default_length(spec: ModelSpec) -> int:
    """Tokens of a sample: `LENGTH`, or a quarter more than the widest window that slides."""
    widest = max((size for size in spec.windows if size is not None), default=0)
    return min(max(LENGTH, widest + widest // BEYOND), spec.max_position_embeddings)


def check_length(length: int, spec: ModelSpec) -> None:
    """Raise UsageError unless samples of this length show all that the model does."""
    widest = max((size for size in spec.windows if size is not None), default=0)
    if length <= widest < spec.max_position_embeddings:
        raise UsageError(
            f"--length is {length:,}, and this model's window is {widest:,} tokens: no sample "
            "would reach beyond it, where old keys are forgotten. Give at least "
            f"{widest + 1:,}."
        )
    if length > spec.max_position_embeddings:
        raise UsageError(
            f"--length is {length:,}; the checkpoint was made for {spec.max_position_embeddings:,} "
            "positions. Give at most that."
        )


def spread(windows: Tensor, count: int) -> Tensor:
    """Choose `count` of the windows [n, S], or all if there are fewer, evenly from the text."""
    total = len(windows)
    if count >= total:
        return windows
    return windows[torch.arange(count) * total // count]
