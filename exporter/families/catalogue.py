"""All families, and how a checkpoint names its own. To add one: its file, and its value here."""

from collections.abc import Mapping

from exporter.families.family import Family
from exporter.families.gemma2 import GEMMA2
from exporter.families.granite import GRANITE
from exporter.families.llama import LLAMA
from exporter.families.mistral import MINISTRAL, MISTRAL
from exporter.families.mistral3 import MINISTRAL3, MISTRAL3
from exporter.families.phi3 import PHI3
from exporter.families.qwen import QWEN2, QWEN3
from exporter.families.smollm3 import SMOLLM3

FAMILIES: tuple[Family, ...] = (
    MISTRAL, MINISTRAL, MINISTRAL3, MISTRAL3, LLAMA, QWEN2, QWEN3, PHI3, GEMMA2, GRANITE, SMOLLM3,
)  # fmt: skip
"""In the order of the README's table."""

BY_MODEL_TYPE: Mapping[str, Family] = {one.name: one for one in FAMILIES}
BY_ARCHITECTURE: Mapping[str, Family] = {
    name: one for one in FAMILIES for name in one.architectures
}
BY_GGUF_NAME: Mapping[str, Family] = {name: one for one in FAMILIES for name in one.gguf_names}
