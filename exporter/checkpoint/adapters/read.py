"""Read PEFT adapters: which weights each changes, and how. Knows nothing about models.

An adapter is a directory with `adapter_config.json` and `adapter_model.safetensors`, as
`PeftModel.save_pretrained` writes it (https://huggingface.co/docs/peft, "Checkpoint format").
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporter.checkpoint.safetensors_file import read_file
from exporter.checkpoint.stored import TORCH_FLOATS, StoredTensor
from exporter.fields import Fields, read_json
from graphs.errors import MistralcError, UsageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PeftModel, then the tuner that wraps the model
_RESUME = "Merge it with peft (merge_and_unload), and export the merged checkpoint."

_LORA = re.compile(
    r"(?P<module>.+?)(\.token_adapter)?\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|lora_magnitude_vector\.weight|trainable_tokens_delta)"
)
# Settings that change what is computed, with the values that leave it as LoRA's publication has it.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "arrow_config": ({},),
    "kasa_config": ({},),
    "monteclora_config": ({},),
    "velora_config": ({},),
    "megatron_config": ({},),
}
# These begin by changing the base weights, which the adapter then expects.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an adapter does to one weight [N, K].

    With `replacement`, it takes the weight's place; `apart` says that peft then keeps a copy of its
    own, which is not tied to another weight (`modules_to_save`). With `a` [r, K] and `b` [N, r],
    `scaling * b a` is added; `embedding` says that both are stored transposed (`a` [r, N], `b`
    [K, r]). With `magnitude` [N], the rows are then scaled to these norms (DoRA, arXiv:2402.09353).
    With `row_values` [n, K], the rows `rows` are replaced.
    """

    replacement: StoredTensor | None = None
    apart: bool = False
    a: StoredTensor | None = None
    b: StoredTensor | None = None
    scaling: float = 1.0
    embedding: bool = False
    magnitude: StoredTensor | None = None
    rows: tuple[int, ...] = ()
    row_values: StoredTensor | None = None

    @property
    def tensors(self) -> Iterator[StoredTensor]:
        """The stored tensors that it needs."""
        for tensor in (self.replacement, self.a, self.b, self.magnitude, self.row_values):
            if tensor is not None:
                yield tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter, and the factor that its LoRA is multiplied by.

    `changes` are by the weight's name in the Hugging Face checkpoint. `base` is the name or path of
    the model that it was trained on, as its configuration has it.
    """

    path: Path
    weight: float
    base: str | None
    changes: Mapping[str, Change] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What to call it: its directory's name, and its weight if it has one."""
        return self.path.name + ("" if self.weight == 1.0 else f" times {self.weight:g}")

    @property
    def facts(self) -> dict[str, Any]:
        """What changes the result beside the stored bytes, as plain data for the fingerprint."""
        return {
            name: [one.scaling, one.apart, one.embedding, list(one.rows),
                   [(tensor.name, tensor.shape, tensor.where.dtype) for tensor in one.tensors]]
            for name, one in sorted(self.changes.items())
        }  # fmt: skip


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (path / CONFIG).is_file()


def parse(given: str) -> tuple[Path, float]:
    """Read `ADAPTER` or `ADAPTER=WEIGHT`; the path becomes absolute."""
    name, equals, weight = given.rpartition("=")
    if not equals or Path(given).expanduser().exists():
        return Path(given).expanduser().absolute(), 1.0
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not name or not math.isfinite(factor) or factor == 0:
        raise UsageError(
            f"--lora is {given!r:.200}; expected ADAPTER or ADAPTER=WEIGHT, the weight a number "
            "other than 0, such as my-adapter=0.5."
        )
    return Path(name).expanduser().absolute(), factor


def read_adapter(path: Path, weight: float = 1.0) -> Adapter:
    """Read an adapter's configuration and the headers of its weights.

    Raises MistralcError for a setting or a tensor that is not LoRA's, rsLoRA's or DoRA's.
    """
    if not is_adapter(path):
        raise MistralcError(
            f"There is no adapter at {path}; expected a directory with {CONFIG} and {WEIGHTS}, as "
            "peft saves it. Check the path."
        )
    config = read_json(path / CONFIG)
    _check(config)
    tensors = _read_tensors(path)
    changes = dict(_changes(config, tensors))
    if weight != 1.0:
        for name, change in changes.items():
            if change.a is None:
                raise UsageError(
                    f"--lora gives {path.name} the weight {weight:g}, but that adapter replaces "
                    f"{name} as a whole; expected an adapter that only adds to weights. Leave the "
                    "weight out."
                )
            changes[name] = replace(change, scaling=change.scaling * weight)
    base = config.text("base_model_name_or_path", "") or None
    return Adapter(path=path, weight=weight, base=base, changes=changes)


def _check(config: Fields) -> None:
    kind = config.text("peft_type", "LORA")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise MistralcError(f"{config.origin}: `peft_type` is {kind}; expected LORA. {_RESUME}")
    for key, neutral in _NEUTRAL.items():
        value = config.values.get(key)
        if value is not None and value not in neutral:
            raise MistralcError(
                f"{config.origin}: `{key}` is {json.dumps(value)[:80]}, which mistralc does not "
                f"merge; expected LoRA, rsLoRA or DoRA without it. {_RESUME}"
            )
    begun = config.values.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASE):
        raise MistralcError(
            f"{config.origin}: `init_lora_weights` is {begun}, which changes the base model's "
            "weights before training; expected an adapter for the base model as it was published. "
            "Save it with peft's option path_initial_model_for_weight_conversion."
        )


def _read_tensors(path: Path) -> Mapping[str, StoredTensor]:
    """The tensors by name, without the prefix of peft's wrappers."""
    if not (path / WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        advice = (
            "There is adapter_model.bin, which mistralc does not read, because opening such a file "
            "can run any code. If you trust it, load it with peft and save it again."
            if pickled else "Download it, or finish the training that writes it."
        )  # fmt: skip
        raise MistralcError(f"{path} has no {WEIGHTS}; expected the adapter's weights. {advice}")
    found = {name.removeprefix(_PREFIX): one for name, one in read_file(path / WEIGHTS).items()}
    for name, tensor in found.items():
        if tensor.where.dtype not in TORCH_FLOATS:
            raise MistralcError(
                f"{path / WEIGHTS}: the tensor {name} is of type {tensor.where.dtype}; expected "
                f"one of {', '.join(TORCH_FLOATS)}. {_RESUME}"
            )
    return found


def _changes(config: Fields, tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Change]]:
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        match = _LORA.fullmatch(name)
        if match is not None:
            part = match["part"].removesuffix(".weight")
            parts.setdefault(match["module"], {})[part] = tensor
            continue
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            raise MistralcError(
                f"{tensor.where.path} has a tensor {tensor.name}, which is no part of LoRA, rsLoRA "
                f"or DoRA. {_RESUME}"
            )
        if module.endswith(".original_module"):  # what a trained copy replaces
            continue
        # A module that was trained as a whole, or an embedding that peft saves as it was resized.
        owner = re.sub(r"\.(base_layer|modules_to_save)$", "", module)
        if owner == module or f"{owner}.weight" not in tensors:
            parts.setdefault(owner, {})["weight"] = tensor
    for module, found in parts.items():
        yield f"{module}.weight", _change(config, module, found)


def _change(config: Fields, module: str, found: Mapping[str, StoredTensor]) -> Change:
    """Join the tensors of one module. Raises MistralcError unless they belong together."""
    embedding = "lora_embedding_A" in found
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    a, b = (found.get(name) for name in names)
    rows: tuple[int, ...] = ()
    values = found.get("trainable_tokens_delta")
    if values is not None:
        rows = _rows(config, module, values)
    elif (a is None) != (b is None) or (a is None and "weight" not in found):
        raise MistralcError(
            f"{config.origin}: of {module} there is only {', '.join(sorted(found))}; expected both "
            f"{names[0]} and {names[1]}. Download the adapter again."
        )
    elif a is not None and b is not None and a.shape[0] != b.shape[-1]:
        raise MistralcError(
            f"{config.origin}: {module} has {names[0]} {list(a.shape)} and {names[1]} "
            f"{list(b.shape)}; expected one rank. Download the adapter again."
        )
    magnitude = found.get("lora_magnitude_vector")
    if embedding and magnitude is not None:
        raise MistralcError(
            f"{config.origin}: {module} is an embedding with DoRA's magnitudes, which mistralc "
            f"does not merge; expected them for linear layers. {_RESUME}"
        )
    saved = config.values.get("modules_to_save") or []
    return Change(
        replacement=found.get("weight"), a=a, b=b, embedding=embedding,
        apart=isinstance(saved, list) and module.rpartition(".")[2] in saved,
        scaling=1.0 if a is None else _scaling(config, module, a.shape[0]),
        magnitude=magnitude, rows=rows, row_values=values,
    )  # fmt: skip


def _scaling(config: Fields, module: str, rank: int) -> float:
    """What `b a` is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
    alpha = _of_pattern(config, "alpha_pattern", module)
    if alpha is None:
        alpha = config.values.get("lora_alpha", 8)
    stated = _of_pattern(config, "rank_pattern", module) or config.values.get("r", rank)
    if stated != rank:
        raise MistralcError(
            f"{config.origin}: the rank of {module} is {json.dumps(stated)[:40]}; its weights have "
            f"rank {rank}. Use the configuration and weights of one adapter."
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise config.invalid("lora_alpha", "a number")
    return alpha / (math.sqrt(rank) if config.flag("use_rslora", default=False) else rank)


def _of_pattern(config: Fields, key: str, module: str) -> Any:
    """The value of the first pattern that the module's name ends with, as peft looks it up."""
    section = config.section(key)
    if section is None:
        return None
    for pattern, value in section.values.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise config.invalid(key, f"regular expressions ({error})") from error
    return None


def _rows(config: Fields, module: str, values: StoredTensor) -> tuple[int, ...]:
    """The token ids whose rows of an embedding are replaced."""
    given = config.values.get("trainable_token_indices", config.values.get("token_indices"))
    if isinstance(given, Mapping):
        given = next(
            (ids for name, ids in given.items() if re.match(rf"(.*\.)?({name})$", module)), None
        )
    valid = isinstance(given, list) and all(type(one) is int and one >= 0 for one in given)
    if not valid or len(given) != values.shape[0]:
        raise config.invalid("trainable_token_indices", f"{values.shape[0]} token ids for {module}")
    return tuple(given)
