"""What is decided before anything is written: the one value that every later step carries out.

`plan` prints a `Build`, `export` carries it out, the reference simulates it and the manifest
records it. Nothing downstream asks the user's options again. Standard library only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from graphs.attention_form import attention_forms
from graphs.contract import GraphContract
from graphs.dtypes import Dtype
from graphs.precisions import Precision
from graphs.quant_scheme import Scheme
from graphs.spec import ModelSpec, RingSpec
from graphs.targets import AttentionForm, CodeLayout, Target

WindowSource = Literal["checkpoint", "user"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How each weight is stored: by a scheme of `schemes`, or as floats of the activation type.

    `layouts` says how codes lie in the file where that is not `onnx`. The codes of `copied` weights
    are the checkpoint's own, so nothing is rounded a second time. All by canonical weight name.
    """

    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    layouts: Mapping[str, CodeLayout] = field(default_factory=dict)
    copied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One model in one precision for one target, with every choice made.

    `window_source` says whether the sliding window is the checkpoint's or the user's choice. With
    `batch_invariant` a token's logits have the same bits whatever is computed beside it.
    """

    target: Target
    precision: Precision
    contract: GraphContract
    storage: Storage
    window_source: WindowSource = "checkpoint"
    batch_invariant: bool = False

    @property
    def spec(self) -> ModelSpec:
        """The model, with the user's window if one was given."""
        return self.contract.spec

    @property
    def ring(self) -> RingSpec:
        """How much the KV ring holds."""
        return self.contract.ring

    @property
    def activation(self) -> Dtype:
        """The type that the graph computes in."""
        return self.contract.activation

    @property
    def rounds_inputs(self) -> bool:
        """Whether some linear rounds its input to 8 bits while it computes.

        `MatMulNBits` does so on ONNX Runtime CPU, even where only weights are quantized.
        """
        storage = self.storage
        rounds = any(scheme.activation is not None for scheme in storage.schemes.values())
        return rounds or (self.target.rounds_blocks and "nbits" in storage.layouts.values())

    @property
    def attention(self) -> Mapping[int | None, AttentionForm]:
        """The form of attention by window; None is a layer without one."""
        return attention_forms(self.target, self.contract)

    @property
    def decodes_apart(self) -> bool:
        """Whether an engine has one profile for single tokens and one for prompts."""
        return "in_place" in self.attention.values()
