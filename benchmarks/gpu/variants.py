"""Forms of a `cuda` graph, to compare with the one that is exported.

    symbolic  as bundles were before the ring's capacity was fixed: masked attention and two merges;
              ONNX Runtime refuses to capture it
    shipped   what `mistralc export --target cuda` writes
    masked    the same, with the portable graph's attention in every layer
    folded    the same, with the query heads of a key head as rows of one matrix
    unfused   the same as masked, with the provider's kernel that repeats no key

The form of attention is a fact of the target (`graphs/attention_form.py`), so a variant is a build
for a target with other facts. If one proves faster on a GPU, change the facts in
`graphs/targets.py`.
"""

from collections.abc import Mapping
from dataclasses import replace

from graphs.build import Build
from graphs.targets import AttentionForm

SYMBOLIC, SHIPPED = "symbolic", "shipped"
FORMS: Mapping[str, AttentionForm] = {
    SYMBOLIC: "masked", "masked": "masked", "folded": "folded", "unfused": "unfused",
}  # fmt: skip
VARIANTS = (SHIPPED, *FORMS)


def variant_build(build: Build, variant: str) -> Build:
    """The build of one of VARIANTS: the same with other forms of attention."""
    if variant == SHIPPED:
        return build
    form = FORMS[variant]
    target = replace(build.target, full_attention=form, windowed_attention=form)
    return replace(build, target=target)
