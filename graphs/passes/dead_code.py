"""Remove nodes, initializers, optional outputs and duplicates that nothing reads.

The passes are onnx_ir's own. The most important one drops the unused key and value outputs of every
`Attention` node, which a backend would otherwise compute.
"""

import onnx_ir as ir
from onnx_ir.passes import common

from graphs.passes.rule import Cleanup


def _remove(model: ir.Model) -> int:
    before = len(model.graph)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
        common.ClearMetadataAndDocStringPass(),  # the tracer's stack traces, with its paths
    )(model)
    for value in model.graph.initializers.values():  # the pass above does not clear these
        value.metadata_props.clear()
    return before - len(model.graph)


DEAD_CODE = Cleanup(name="dead_code", run=_remove)
