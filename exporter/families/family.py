"""What a family of models is: how its configuration is read, and where its files keep each weight.

Knows no file. `catalogue.py` lists all families; `docs/extending.md` says how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from exporter.fields import Fields
from graphs.spec import ModelSpec

Format = Literal["huggingface", "mistral", "gguf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAs:
    """Where a canonical weight is in the files of a checkpoint.

    `rows` are those of a fused tensor, from the first to the one after the last; None means all.
    The rows of `interleaved_heads` heads are in interleaved order: see `names.py`. With `add_one`,
    the stored values are the weight minus 1, as in Gemma's norms.
    """

    name: str
    rows: tuple[int, int] | None = None
    interleaved_heads: int | None = None
    add_one: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family. `name` is transformers' `model_type`, `title` the models that people know.

    `adds` says what it computes that Llama does not, and `needs` names the facts of a target
    (`graphs/targets.py`) without which that is refused; both are for the README.

    `read_config` reads a `config.json`. `read_gguf` completes the spec that the keys common to all
    GGUF architectures give; `gguf_keys` are the others that it reads, without the architecture. A
    GGUF file may rotate a part of each head only with `rotates_parts`.

    `tensors` says where a canonical weight is stored. `prefixes` are replaced in the names of a
    file's tensors, and tensors whose names begin with one of `left_out` belong to other models of
    the same checkpoint. With `head_may_be_tied`, an output layer that is not stored is the
    embedding, whatever the configuration says.
    """

    name: str
    title: str
    adds: str
    architectures: tuple[str, ...]
    read_config: Callable[[Fields], ModelSpec]
    tensors: Callable[[ModelSpec, Format, str], StoredAs]
    gguf_names: tuple[str, ...] = ()
    gguf_keys: frozenset[str] = frozenset()
    read_gguf: Callable[[Fields, ModelSpec], ModelSpec] | None = None
    rotates_parts: bool = False
    prefixes: Mapping[str, str] = field(default_factory=dict, hash=False)
    left_out: tuple[str, ...] = ()
    head_may_be_tied: bool = False
    needs: tuple[str, ...] = ()

    def text_name(self, name: str) -> str | None:
        """Return the name of a file's tensor in the text model; None if it is of another model."""
        for prefix, replacement in self.prefixes.items():
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
        return None if name.startswith(self.left_out) else name
