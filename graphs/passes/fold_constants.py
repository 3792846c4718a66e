"""Fold constants, but never a weight.

Nodes that read only constants are computed now, by onnxscript's folder. A node that reads a weight
is left alone, whatever its size: weights have no numbers at this stage, and folding a `Transpose`
into one would store it twice.
"""

import onnx_ir as ir
from onnxscript import optimizer

from graphs.passes.rule import Cleanup
from graphs.passes.weight_ref import weight_of

LARGEST_RESULT = 65_536  # bytes; room for rotary tables and ranges, not for tensors


def _reads_no_weight(node: ir.Node) -> bool | None:
    """False forbids folding; None lets the folder decide."""
    return False if any(weight_of(value) is not None for value in node.inputs) else None


def _fold(model: ir.Model) -> int:
    before = len(model.graph)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=LARGEST_RESULT,
        output_size_limit=LARGEST_RESULT,
        should_fold=_reads_no_weight,
    )
    return before - len(model.graph)


FOLD_CONSTANTS = Cleanup(name="fold_constants", run=_fold)
