"""One configuration's values, checked as they are read. Knows nothing about what they mean.

A JSON `null` counts as absent everywhere, as it does for the libraries that wrote the files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from graphs.errors import MistralcError

LARGEST_INTEGER = 2**31 - 1  # ONNX and TensorRT dimensions go no further in practice
LARGEST_NUMBER = 1e30  # below float32's maximum, so that every accepted number survives a cast


@dataclass(frozen=True, slots=True)
class Fields:
    """The values of one configuration file or one section of it; `origin` is named in errors."""

    values: Mapping[str, Any]
    origin: str

    def has(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; `default` where it is absent, if there is one."""
        value = self._get(key, "a whole number of at least 1", default)
        if type(value) is not int or not 1 <= value <= LARGEST_INTEGER:
            raise self.wrong(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0, whole or not, as float."""
        value = self._get(key, "a number above 0", default)
        if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, "true or false", default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, "a string", default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def section(self, key: str) -> Self | None:
        """The object under `key` as Fields of its own; None where it is absent or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "an object or null")
        return type(self)(value, f"{self.origin}, {key}")

    def wrong(self, key: str, expected: str) -> MistralcError:
        """The error for a value of the wrong type or range, for the caller to raise."""
        return MistralcError(
            f"{self.origin}: `{key}` is {_shown(self.values.get(key))}; {expected} is expected. "
            "Correct the checkpoint's configuration, or fetch the file again."
        )

    def only(self, allowed: frozenset[str], why: str) -> None:
        """Raise for the first key with a value that is not `allowed`; `why` ends the message."""
        for key, value in self.values.items():
            if key not in allowed and value is not None:
                raise MistralcError(
                    f"{self.origin}: `{key}` ({_shown(value)}) is not a setting mistralc knows; "
                    f"{', '.join(sorted(allowed))} are expected. {why}"
                )

    def _get(self, key: str, expected: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise MistralcError(
                f"{self.origin}: `{key}` is missing; {expected} is expected. "
                "Take the configuration file that was published with these weights."
            )
        return value


def read_json(path: Path) -> Fields:
    """The object in a JSON file. Raises MistralcError when there is none."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MistralcError(
            f"{path} cannot be read as JSON ({error}); the configuration of a checkpoint is "
            "expected there. Fetch the file again."
        ) from error
    if not isinstance(values, dict):
        raise MistralcError(
            f"{path} holds {_shown(values)} instead of a JSON object with the configuration of "
            "a checkpoint. Fetch the file again."
        )
    return Fields(values, str(path))


def _shown(value: Any) -> str:
    """A value as the user would find it in the file, cut where it gets long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        # TypeError: not JSON; ValueError: a cycle, or an integer too long to print.
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
