"""One name for two libraries: `tensorrt` and `tensorrt_rtx` share one API. Knows no engine.

Building and running import TensorRT through here and nowhere else, so that a missing library is
one clear message and the rest of the code does not know which of the two it has.
"""

import importlib
from typing import Any

from graphs.errors import MistralcError

MODULE = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
DISTRIBUTION = {"rtx": "tensorrt-rtx-cu13", "tensorrt": "tensorrt"}


def load(target: str) -> Any:
    """Import the library of a target, `rtx` or `tensorrt`; raises MistralcError where it is not."""
    try:
        return importlib.import_module(MODULE[target])
    except ImportError as error:
        raise MistralcError(
            f"The target {target} needs {MODULE[target]}, which cannot be imported here ({error}). "
            f"Install it: pip install 'mistralc[{target}]'."
        ) from error
