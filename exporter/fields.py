"""Read configuration values and check their types. Knows nothing about their meaning.

A JSON `null` counts as absent, as it does for the libraries that write these files.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from graphs.errors import MistralcError

LARGEST_INTEGER = 2**31 - 1  # the largest dimension that ONNX and TensorRT take in practice
LARGEST_NUMBER = 1e30  # below float32's maximum, so that every accepted number survives a cast


@dataclass(frozen=True, slots=True)
class Fields:
    """The values of a configuration file, or of one section; errors name its `origin`."""

    values: Mapping[str, Any]
    origin: str

    def has(self, key: str) -> bool:
        """Whether `key` is present and not null."""
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 1, or `default` if the key is absent."""
        value = self._get(key, "a whole number of at least 1", default)
        if type(value) is not int or not 1 <= value <= LARGEST_INTEGER:
            raise self.invalid(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number above 0 as float."""
        value = self._get(key, "a number above 0", default)
        if type(value) not in (int, float) or not 0 < value < LARGEST_NUMBER:
            raise self.invalid(key, "a number above 0")
        return float(value)

    def decimal(self, key: str, default: float | None = None) -> float:
        """Return a number above 0 that was stored as float32 as its shortest decimal.

        GGUF stores 1e-5 as 9.999999747378752e-06.
        """
        value = self.number(key, default)
        short = np.float32(value)
        return float(str(short)) if float(short) == value else value

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers above 0 as floats, at least one."""
        expected = "a list of numbers above 0"
        values = self._get(key, expected, None)
        good = isinstance(values, list) and all(
            type(one) in (int, float) and 0 < one < LARGEST_NUMBER for one in values
        )
        if not good or not values:
            raise self.invalid(key, expected)
        return tuple(map(float, values))

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(key, "true or false", default)
        if type(value) is not bool:
            raise self.invalid(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._get(key, "a string", default)
        if not isinstance(value, str):
            raise self.invalid(key, "a string")
        return value

    def section(self, key: str) -> Self | None:
        """Return the object under `key` as Fields; None if it is absent or empty."""
        value = self.values.get(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.invalid(key, "an object or null")
        return type(self)(value, f"{self.origin}, {key}")

    def invalid(self, key: str, expected: str) -> MistralcError:
        """Return the error for a value of the wrong type or range, for the caller to raise."""
        return MistralcError(
            f"{self.origin}: `{key}` is {_shown(self.values.get(key))}; expected {expected}. "
            "Correct the checkpoint's configuration, or download the file again."
        )

    def reject_others(self, allowed: frozenset[str], advice: str) -> None:
        """Raise for the first key with a value that is not `allowed`; `advice` ends the error."""
        for key, value in self.values.items():
            if key not in allowed and value is not None:
                raise MistralcError(
                    f"{self.origin}: `{key}` ({_shown(value)}) is not a setting mistralc knows; "
                    f"expected only {', '.join(sorted(allowed))}. {advice}"
                )

    def _get(self, key: str, expected: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise MistralcError(
                f"{self.origin}: `{key}` is missing; expected {expected}. "
                "Use the configuration file that was published with these weights."
            )
        return value


def read_json(path: Path) -> Fields:
    """Read the object in a JSON file. Raises MistralcError if it holds none."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise MistralcError(
            f"{path} cannot be read as JSON ({error}); expected the configuration of a "
            "checkpoint. Download the file again."
        ) from error
    if not isinstance(values, dict):
        raise MistralcError(
            f"{path} holds {_shown(values)}; expected a JSON object, the configuration of a "
            "checkpoint. Download the file again."
        )
    return Fields(values, str(path))


def _shown(value: Any) -> str:
    """Return a value as it is written in the file, cut to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        # TypeError: not JSON. ValueError: a cycle, or an integer too long to print.
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
