"""Which form of attention each layer takes. Decided here and nowhere else. Standard library only.

All forms give the same result from the same ring; they differ in what is read and copied for it.

`masked`    the operator of the portable graph: q [B, H, S, D], keys [B, K, C, D], a mask [S, C].
`unfused`   the same graph; ONNX Runtime CUDA is told to take its unfused kernel, which repeats no
            key (`runtime/backends/onnxruntime_cuda.py`). No target takes it: it is to be measured.
`grouped`   ONNX Runtime's GroupQueryAttention, which writes the ring and reads its filled part; it
            takes positions for slots, so only a layer whose ring never wraps can have it.
`folded`    the query heads that share a key head are rows of one matrix, so no key is repeated.
`in_place`  `masked`, and for prompts the chunk's own keys once more behind the ring, masked out.
            TensorRT then reads the ring where it lies when it decodes; see `trt/in_place.py`.

To change a choice after measuring, change the target's facts (`graphs/targets.py`): for `cuda`,
`windowed_attention="unfused"` instead of "folded".
"""

from collections.abc import Mapping
from typing import Final

from graphs.contract import GraphContract
from graphs.targets import AttentionForm, Target

SUMMARIES: Final[Mapping[AttentionForm, str]] = {
    "masked": "over the whole ring, with a mask",
    "unfused": "over the whole ring, with a mask, in the unfused kernel",
    "grouped": "GroupQueryAttention, over the filled part of the ring",
    "folded": "query heads folded into rows, over the whole ring",
    "in_place": "the ring read in place for single tokens; prompts in a profile of their own",
}

HEAD_MULTIPLE = 16  # GroupQueryAttention rotates heads only if their size is a multiple of this


def attention_forms(target: Target, contract: GraphContract) -> Mapping[int | None, AttentionForm]:
    """The form for each window of the model; None is a layer without one."""
    return {size: _form(target, contract, size) for size in contract.spec.windows}


def summarize(forms: Mapping[int | None, AttentionForm]) -> str:
    """Say in words which form each window has."""
    if len(set(forms.values())) == 1:
        form = next(iter(forms.values()))
        return f"{form}: {SUMMARIES[form]}"
    return "; ".join(
        f"{'without a window' if size is None else f'window {size:,}'} {form} ({SUMMARIES[form]})"
        for size, form in forms.items()
    )


def _form(target: Target, contract: GraphContract, window: int | None) -> AttentionForm:
    spec = contract.spec
    form = target.full_attention if window is None else target.windowed_attention
    if form == "grouped" and spec.head_dim % HEAD_MULTIPLE:
        form = target.windowed_attention
    # One form for the whole engine: the others need other profiles.
    if form == "in_place" and max(contract.capacities.values()) > target.max_in_place_slots:
        form = "folded"
    if form == "folded" and spec.num_attention_heads == spec.num_key_value_heads:
        form = "masked"
    return form
