"""Compare a loaded plan with the graph contract. Neither loads nor runs anything.

The ring's capacity, the chunk and the batch are compiled into a plan. A plan built for other sizes
would read and write out of bounds, so these are compared before memory is allocated: names, types,
shapes, the aliasing of the caches, and the optimization profiles.
"""

from typing import Any, NamedTuple

from graphs.contract import STEP_INPUTS, GraphContract, TensorSpec
from graphs.dtypes import ELEMENT_TYPES
from graphs.errors import MistralcError
from graphs.spec import RingSpec

_REMEDY = "The plan does not belong to this manifest: export the checkpoint again."


class Profiles(NamedTuple):
    """Indices of the optimization profiles: for steps of one token, and for all other steps."""

    decode: int
    prefill: int


def check_plan(trt: Any, engine: Any, contract: GraphContract, batch: int) -> Profiles:
    """Compare an engine with the graph contract; returns the profiles to run it with.

    Raises MistralcError that names the first tensor that differs.
    """
    expected = [
        *((tensor, trt.TensorIOMode.INPUT) for tensor in contract.inputs),
        *((tensor, trt.TensorIOMode.OUTPUT) for tensor in contract.outputs),
    ]
    found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    names = {tensor.name for tensor, _ in expected}
    if found != names:
        first = sorted(found ^ names)[0]
        raise MistralcError(
            f"The plan has {len(found)} inputs and outputs and the model {len(names)}; {first} is "
            f"only in {'the plan' if first in found else 'the model'}. {_REMEDY}"
        )
    for tensor, mode in expected:
        _check_tensor(trt, engine, tensor, mode, contract.capacities)
    return _profiles(engine, contract.ring, batch)


def _check_tensor(
    trt: Any, engine: Any, tensor: TensorSpec, mode: Any, capacities: dict[str, int]
) -> None:
    name = tensor.name
    dtype = getattr(trt.DataType, str(ELEMENT_TYPES[tensor.dtype].tensorrt))
    facts = {
        "direction": (engine.get_tensor_mode(name), mode),
        "type": (engine.get_tensor_dtype(name), dtype),
        "location": (engine.get_tensor_location(name), trt.TensorLocation.DEVICE),
        "shape": (tuple(engine.get_tensor_shape(name)), tensor.sized(capacities)),
    }
    if name.startswith("present_"):
        past = name.replace("present_", "past_", 1)
        # None or "" means that another buffer is written, and the ring would stay empty.
        facts["memory"] = (engine.get_aliased_input_tensor(name) or "its own", past)
    for what, (got, wanted) in facts.items():
        if got != wanted:
            raise MistralcError(
                f"The {what} of {name} in the plan is {got}; {wanted} is expected (-1 is any "
                f"size). {_REMEDY}"
            )


def _profiles(engine: Any, ring: RingSpec, batch: int) -> Profiles:
    """The first profile that covers one token, and the first that covers 1 to `chunk` tokens."""
    decode, chunk = {"S": 1, "T": 1}, {"S": ring.chunk, "T": ring.chunk}
    serving: list[list[int]] = [[], []]
    seen = []
    for index in range(engine.num_optimization_profiles):
        low, _, high = zip(*(_range(engine, name, index) for name in STEP_INPUTS), strict=True)
        seen.append(f"rows {low[0][0]} to {high[0][0]}, tokens {low[0][1]} to {high[0][1]}")
        for most, found in zip((decode, chunk), serving, strict=True):
            needed = [(batch, most["S"]), (batch, most["S"]), (batch, most["T"])]
            if all(
                least[0] <= batch <= top[0] and least[1] <= 1 and size[1] <= top[1]
                for least, top, size in zip(low, high, needed, strict=True)
            ):
                found.append(index)
    if not all(serving):
        raise MistralcError(
            f"This session is for {batch} rows and steps of 1 to {ring.chunk} tokens, with as many "
            f"rows of logits; the plan was built for {'; and for '.join(seen)}. Ask for no more "
            "rows than --max-batch, or export the checkpoint again with these sizes."
        )
    return Profiles(serving[0][0], serving[1][0])


def _range(engine: Any, name: str, profile: int) -> list[tuple[int, ...]]:
    """Smallest, optimal and largest shape of an input in a profile."""
    return [tuple(shape) for shape in engine.get_tensor_profile_shape(name, profile)]
