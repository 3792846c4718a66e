"""Other forms of a `cuda` graph, to measure beside the one that is exported.

    symbolic  as bundles were before the capacity was fixed: masked attention, two merges, and a
              ring whose size is a letter, for which ONNX Runtime refuses CUDA graphs
    shipped   what `mistralc export --target cuda` writes
    masked    the same with the portable graph's attention in every layer
    folded    the same with the query heads of a key head as rows of one matrix

The form of attention is a fact of the target (`graphs/attention_form.py`), so a variant is a target
with other facts. If one proves faster on a GPU, change the facts in `graphs/targets.py`.
"""

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from exporter.decoder.trace import trace
from exporter.quantization.make_recipe import quantization
from exporter.quantization.recipe import Recipe
from graphs.build import Build
from graphs.passes.dead_code import DEAD_CODE
from graphs.passes.fix_dimensions import fix_dimensions
from graphs.passes.merge_linears import MERGE_GATE_UP, MERGE_QKV
from graphs.passes.pipeline import PORTABLE, lower, run
from graphs.targets import AttentionForm

SYMBOLIC, SHIPPED = "symbolic", "shipped"
FORMS: Mapping[str, AttentionForm] = {"masked": "masked", "folded": "folded"}
VARIANTS = (SYMBOLIC, SHIPPED, *FORMS)


def variant_model(build: Build, recipe: Recipe, variant: str) -> ir.Model:
    """Trace and lower the graph of a build in one of VARIANTS; weights are references."""
    model = trace(build.spec, build.activation)
    if variant == SYMBOLIC:
        if recipe.schemes:
            raise ValueError("the symbolic variant was never built with quantized weights")
        run(model, build.spec, (*PORTABLE, MERGE_QKV, MERGE_GATE_UP, DEAD_CODE))
        return model
    if variant != SHIPPED:
        form = FORMS[variant]
        target = replace(build.target, full_attention=form, windowed_attention=form)
        build = replace(build, target=target)
    fix_dimensions(model, build.contract.capacities)
    lower(model, build, quantization(recipe))
    return model
