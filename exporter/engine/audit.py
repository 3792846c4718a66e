"""Audit an engine by TensorRT's own list of its layers. Builds and runs nothing.

An engine can give right answers and still be unfit for production: weights stored twice, attention
split into products and a softmax, a cache copied instead of updated in place. The answers do not
show this, but the layers do, and the builder lists them even on a machine without a GPU:

    Name: _gemm_mha_v2_myl0_6, LayerType: kgen, Inputs: [ { Name: … }], Constants: […],
    Outputs: […], TacticName: , StreamId: 0, Metadata: [ONNX Layer: node_attention]
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import onnx_ir as ir

from exporter.engine.request import EnginePlan
from graphs.contract import GraphContract
from graphs.errors import MistralcError

FUSED = re.compile(r"mha|fmha|flash", re.IGNORECASE)  # in the names of fused attention kernels
REPEAT = "Repl"  # in the names of kernels that write a value several times
STORED_ONCE = 1.02  # plan bytes / weight bytes; with a 7B's linears stored twice it is 1.9
ALLOWANCE = 4 << 20  # bytes of kernels and tables, most of a small model's plan

_NAME = re.compile(r"Name: (\S+), LayerType: (\w*)")
_SECTION = re.compile(r"(Inputs|Outputs): \[(.*?)\](?=, (?:Constants|TacticName):)")
_TENSOR = re.compile(r"\{ Name: (\S+),")
_SOURCE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """One layer of an engine: the tensors it reads and writes, and the ONNX nodes it implements."""

    name: str
    kind: str
    inputs: frozenset[str]
    outputs: frozenset[str]
    nodes: frozenset[str]

    @classmethod
    def parse(cls, line: str) -> Self | None:
        """Parse a line of TensorRT's list; None if it does not describe a layer."""
        found = _NAME.match(line)
        if found is None:
            return None
        sections = dict(_SECTION.findall(line))
        inputs, outputs = (
            frozenset(_TENSOR.findall(sections.get(name, ""))) for name in ("Inputs", "Outputs")
        )
        nodes = frozenset(_SOURCE.findall(line))
        return cls(name=found[1], kind=found[2], inputs=inputs, outputs=outputs, nodes=nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The facts that decide whether an engine may ship. Sizes are in bytes.

    `attention_fused` of `attention` nodes run in a fused kernel. `caches_in_place` of `caches` are
    read and written under one name. `caches_repeated` are written once per query head.
    """

    layers: Mapping[str, int]
    attention: int
    attention_fused: int
    caches: int
    caches_in_place: int
    caches_repeated: int
    interface: str
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
        if self.plan_bytes > STORED_ONCE * self.weight_bytes + ALLOWANCE:
            ratio = self.plan_bytes / self.weight_bytes
            found.append(f"the plan has {ratio:.2f} times the bytes of the weights")
        if self.interface != "matches the contract":
            found.append(self.interface)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain data for the manifest."""
        return {**asdict(self), "warnings": list(self.warnings), "faults": self.faults}


def audit(plan: EnginePlan, graph: ir.Graph, contract: GraphContract, weights: int) -> Audit:
    """Compare the layers with the graph they were built from; `weights` is the weights' size."""
    layers = [layer for layer in map(LayerInfo.parse, plan.layers) if layer is not None]
    attention = {str(node.name) for node in graph if node.op_type == "Attention"}
    fused = {n for layer in layers if FUSED.search(layer.name) for n in layer.nodes & attention}
    caches = {row.name for row in contract.outputs} - {"logits"}
    pasts = {row.name for row in contract.inputs if row.name.startswith("past_")}
    copied = {n.replace("past_", "present_") for layer in layers for n in layer.inputs & pasts}
    in_place = {n for layer in layers for n in layer.inputs & layer.outputs & caches} - copied
    repeated = {n for layer in layers if REPEAT in layer.name for n in layer.inputs & caches}
    return Audit(
        layers=dict(sorted(Counter(layer.kind for layer in layers).items())),
        attention=len(attention),
        attention_fused=len(fused),
        caches=len(caches),
        caches_in_place=len(in_place),
        caches_repeated=len(repeated),
        interface=_interface(plan, contract),
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
        "caches repeated for query heads": record["caches_repeated"],
        "interface": record["interface"],
        "plan": f"{record['plan_bytes']:,} bytes, {ratio:.3f} times the weights'",
        "SHA-256": record["plan_sha256"],
        "faults": "; ".join(record["faults"]) or "none",
    }
    lines = ["# Engine", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", f"TensorRT's warnings: {len(record['warnings'])}.", ""]
    return "\n".join([*lines, *(f"- {' '.join(w.split())}" for w in record["warnings"]), ""])


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
