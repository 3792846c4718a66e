"""One name for two libraries: `tensorrt` and `tensorrt_rtx` share one API. Knows no engine.

Building and running import TensorRT through here and nowhere else, so that a missing library is
one clear message and the rest of the code does not know which of the two it has.
"""

import importlib
from typing import Any

from graphs.errors import MistralcError
from graphs.targets import Target


def load(target: Target) -> Any:
    """Import a target's TensorRT. Raises MistralcError if it cannot be imported."""
    module = target.backend_module
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MistralcError(
            f"The target {target.name} needs {module}, which cannot be imported here ({error}). "
            f"Install it: pip install 'mistralc[{target.name}]'."
        ) from error
