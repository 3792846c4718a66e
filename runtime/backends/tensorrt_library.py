"""Import a target's TensorRT: `tensorrt` and `tensorrt_rtx` share one API. Knows no engine.

The builder and the session import TensorRT only through this module, so a missing library gives
one clear message and no other code depends on which of the two it has.
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
