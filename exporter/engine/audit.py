"""Audit an engine by TensorRT's own list of its layers. Builds and runs nothing.

An engine can give right answers and still be unfit for production: weights stored twice or written
out dequantized at every token, attention split into products and a softmax, a ring copied instead
of read in place. The answers do not show this, but the layers do, and the builder lists them even
on a machine without a GPU.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from exporter.engine.layers import LayerInfo, parse_layers
from exporter.engine.request import EnginePlan
from exporter.engine.traffic import (
    Traffic,
    attends,
    copied_caches,
    dequantized,
    measure,
    updated_caches,
)
from graphs.build import Build
from graphs.contract import GraphContract
from graphs.dtypes import item_size
from graphs.errors import MistralcError

REPEAT = "Repl"  # in the names of kernels that write a value several times
STORED_ONCE = 1.02  # plan bytes / weight bytes; with a 7B's linears stored twice it is 1.9
ALLOWANCE, ALLOWANCE_PER_LAYER = 6 << 20, 5 << 18
"""Bytes of kernels and tables, which are most of a small model's plan: SmolLM2's 30 layers take 26
MB in bf16 and 32 MB in 4 and 8 bits, two layers of width 512 6 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The facts that decide whether an engine may ship. Sizes are in bytes.

    `decode` is a step of one token, `prompt` a step of a whole chunk. `attention_fused` of
    `attention` nodes run in a fused kernel in every profile. `caches_in_place` of `caches` are
    written where they lie; `caches_copied` are written out elsewhere to decode, `caches_repeated`
    once for each query head in any step. `stored_twice` are bytes of weights that the profiles
    want in different layouts, `dequantized` bytes of weights that are written out to decode.
    `rings_stay` says that the build decided on rings that are never copied to decode.
    """

    layers: Mapping[str, int]
    attention: int
    attention_fused: int
    caches: int
    caches_in_place: int
    caches_copied: int
    caches_repeated: int
    rings_stay: bool
    dequantized: int
    stored_twice: int
    interface: str
    decode: Traffic
    prompt: Traffic
    plan_bytes: int
    weight_bytes: int
    plan_sha256: str
    tensorrt_version: str
    warnings: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """Describe each fault of the engine; empty if there is none."""
        found = []
        if self.attention_fused < self.attention:
            found.append(
                f"only {self.attention_fused} of {self.attention} attention layers are fused"
            )
        if self.caches_in_place < self.caches:
            found.append(f"only {self.caches_in_place} of {self.caches} caches are in place")
        if self.rings_stay and self.caches_copied:
            found.append(f"{self.caches_copied} of {self.caches} rings are copied at every token")
        if self.caches_repeated:
            found.append(
                f"{self.caches_repeated} of {self.caches} rings are repeated for the query heads"
            )
        if self.dequantized:
            found.append(
                f"{self.dequantized:,} bytes of weights are written out dequantized at every token"
            )
        if self.stored_twice:
            found.append(f"{self.stored_twice:,} bytes of weights are stored in two layouts")
        allowed = ALLOWANCE + ALLOWANCE_PER_LAYER * self.attention
        if self.plan_bytes > STORED_ONCE * self.weight_bytes + allowed:
            ratio = self.plan_bytes / self.weight_bytes
            found.append(f"the plan has {ratio:.2f} times the bytes of the weights")
        if self.interface != "matches the contract":
            found.append(self.interface)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        found = {**asdict(self), "warnings": list(self.warnings), "faults": self.faults}
        for name, step in (("decode", self.decode), ("prompt", self.prompt)):
            found[name]["total"] = step.total
        return found


def audit(plan: EnginePlan, graph: ir.Graph, build: Build, weights: int) -> Audit:
    """Compare the layers with the graph they were built from; `weights` is the weights' size."""
    contract = build.contract
    layers = parse_layers(plan.layers)
    profiles = [
        [layer for layer in layers if layer.profile == number]
        for number in sorted({layer.profile for layer in layers})
    ] or [[]]
    decode, prompt = profiles[0], profiles[-1]
    attention = {str(node.name) for node in graph if node.op_type == "Attention"}
    fused = [
        {name for layer in profile if attends(layer) for name in layer.nodes & attention}
        for profile in profiles
    ]
    caches = {row.name for row in contract.outputs} - {"logits"}
    in_place = [
        {name for layer in profile for name in updated_caches(layer)} & caches
        for profile in profiles
    ]
    return Audit(
        layers=dict(sorted(Counter(layer.kind for layer in layers).items())),
        attention=contract.spec.num_hidden_layers,
        attention_fused=len(set.intersection(*fused)),
        caches=len(caches),
        caches_in_place=len(set.intersection(*in_place)),
        caches_copied=len({name for layer in decode for name in copied_caches(layer)}),
        caches_repeated=len(_repeated(layers)),
        rings_stay=build.decodes_apart,
        dequantized=sum(
            one.count * item_size(contract.activation)
            for layer in decode
            for one in dequantized(layer)
        ),
        stored_twice=_stored_twice(profiles),
        interface=_interface(plan, contract),
        decode=measure(decode, contract, 1),
        prompt=measure(prompt, contract, contract.ring.chunk),
        plan_bytes=plan.nbytes,
        weight_bytes=weights,
        plan_sha256=plan.sha256,
        tensorrt_version=plan.version,
        warnings=plan.warnings,
    )


def require(found: Audit, *, allow: bool) -> None:
    """Raise MistralcError if the engine has a fault, unless the user allowed faults."""
    if found.faults and not allow:
        raise MistralcError(
            f"TensorRT {found.tensorrt_version} built an engine that is not fit to ship: "
            f"{'; '.join(found.faults)}. Add --allow-faults to publish it anyway, or try another "
            "version of TensorRT."
        )


def to_markdown(record: Mapping[str, Any]) -> str:
    """Format an audit's record as a section of the bundle's report."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in record["layers"].items())
    ratio = record["plan_bytes"] / record["weight_bytes"]
    rows = {
        "TensorRT": record["tensorrt_version"],
        "GPUs": ", ".join(record["gpus"]) or "every GPU that it supports",
        "layers": kinds,
        "fused attention": f"{record['attention_fused']} of {record['attention']}",
        "caches in place": f"{record['caches_in_place']} of {record['caches']}",
        "rings copied at every token": record["caches_copied"],
        "rings repeated for query heads": record["caches_repeated"],
        "weights dequantized at every token": f"{record['dequantized']:,} bytes",
        "weights in two layouts": f"{record['stored_twice']:,} bytes",
        "interface": record["interface"],
        "plan": f"{record['plan_bytes']:,} bytes, {ratio:.3f} times the weights'",
        "SHA-256": record["plan_sha256"],
        "faults": "; ".join(record["faults"]) or "none",
    }
    lines = ["# Engine", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "Bytes that a step of one row reads and writes, by its kernels:", ""]
    lines += ["| step | kernels | weights | cache | activations | moved | in all |",
              "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    lines += [_step_row(record[name]) for name in ("decode", "prompt")]
    lines += ["", f"TensorRT's warnings: {len(record['warnings'])}.", ""]
    return "\n".join([*lines, *(f"- {' '.join(w.split())}" for w in record["warnings"]), ""])


def _step_row(step: Mapping[str, Any]) -> str:
    tokens = f"{step['tokens']} token{'s' if step['tokens'] > 1 else ''}"
    parts = (
        step[name] for name in ("kernels", "weights", "cache", "activations", "moved", "total")
    )
    return f"| {tokens} | {' | '.join(f'{part:,}' for part in parts)} |"


def _repeated(layers: Sequence[LayerInfo]) -> set[str]:
    """Names of the rings that a kernel writes out several times."""
    return {name for layer in layers if REPEAT in layer.operations for name in copied_caches(layer)}


def _stored_twice(profiles: Sequence[Sequence[LayerInfo]]) -> int:
    """Bytes of the constants of later profiles whose layout the first profile does not have."""
    first, *others = map(_bytes_by_layout, profiles)
    return sum((other - first).total() for other in others)


def _bytes_by_layout(profile: Sequence[LayerInfo]) -> Counter[Any]:
    """Bytes of all constants, each once, by the layout in which they lie in memory."""
    found: Counter[Any] = Counter()
    for one in {one.name: one for layer in profile for one in layer.constants}.values():
        if len(one.layout[1]) > 1:  # a scale or an angle is small, and may differ
            found[one.layout] += one.nbytes
    return found


def _interface(plan: EnginePlan, contract: GraphContract) -> str:
    """Compare the engine's inputs and outputs with the graph contract."""
    for kind, tensors, table in (
        ("input", plan.inputs, contract.inputs),
        ("output", plan.outputs, contract.outputs),
    ):
        expected = {row.name: row.sized(contract.capacities) for row in table}
        if dict(tensors) != expected:
            wrong = sorted(set(expected.items()) ^ set(tensors.items()))[0]
            return f"the {kind} {wrong[0]} does not match the contract"
    return "matches the contract"
