"""What an engine is built from, and the plan that comes out of it. Builds nothing."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from exporter.engine.weights import stored_weights
from exporter.options import EngineOptions
from graphs.contract import GraphContract
from graphs.spec import ModelSpec, RingSpec

Profile = tuple[Mapping[str, int], ...]
"""Smallest, best and largest sizes of the letters B, S and T."""


def profiles(ring: RingSpec, *, apart: bool) -> tuple[Profile, ...]:
    """Return the ranges of steps that an engine is built for.

    A single profile covers steps of one token up to a chunk. It is tuned for one token, because
    most steps decode. Profiles that are `apart` have exactly one token in the first. They take at
    least two rows: with exactly one row, TensorRT-RTX 1.7 dequantizes whole weights at every token
    and stores the weights of q, k and v twice.
    """
    least = {"B": 1, "S": 1, "T": 1}
    rows = max(2, ring.max_batch) if apart else ring.max_batch
    chunk = {"B": rows, "S": ring.chunk, "T": ring.chunk}
    if not apart:
        return ((least, least, chunk),)
    return (least, least, {**least, "B": rows}), (least, {**least, "S": ring.chunk}, chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """Compile the ONNX file `graph`, whose ring capacity is fixed, into the file `plan`."""

    graph: Path
    plan: Path
    contract: GraphContract
    target: str
    profiles: tuple[Profile, ...]
    options: EngineOptions = field(default_factory=EngineOptions)

    def to_text(self) -> str:
        """Return the request as JSON, for the builder process."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what `to_text` wrote."""
        data = json.loads(text)
        options = {**data["options"], "gpus": tuple(data["options"]["gpus"])}
        return cls(**{
            **data, "graph": Path(data["graph"]), "plan": Path(data["plan"]),
            "contract": GraphContract(
                spec=ModelSpec.from_json(data["contract"]["spec"]),
                ring=RingSpec(**data["contract"]["ring"]),
                activation=data["contract"]["activation"],
            ),
            "profiles": tuple(map(tuple, data["profiles"])),
            "options": EngineOptions(**options),
        })  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that the graph refers to; the plan has about as many."""
        return sum(weight.length for weight in stored_weights(self.graph))

    @property
    def work(self) -> int:
        """Total that progress counts up to, in bytes: compiling takes about as long as writing."""
        return 2 * self.weight_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """A finished TensorRT plan: its size and SHA-256, and what the builder reported.

    `version` is TensorRT's. `layers` is TensorRT's own list of the engine's layers, one line
    each. `inputs` and `outputs` map tensor names to shapes, with -1 for a dynamic dimension.
    """

    nbytes: int
    sha256: str
    version: str
    warnings: tuple[str, ...]
    layers: tuple[str, ...]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, tuple[int, ...]]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the `asdict` of a plan back from JSON, which turned its tuples into lists."""
        lists = {name: tuple(data[name]) for name in ("warnings", "layers")}
        shapes = {
            name: {key: tuple(shape) for key, shape in data[name].items()}
            for name in ("inputs", "outputs")
        }
        return cls(**{**data, **lists, **shapes})
