"""Import a target's TensorRT: `tensorrt` and `tensorrt_rtx` share one API. Knows no engine.

The builder and the session import TensorRT only through this module, so a missing library gives
one clear message and no other code depends on which of the two it has.
"""

import importlib
from functools import cache as once
from typing import Any

from graphs.errors import MistralcError
from graphs.targets import Target

KEPT_ERRORS = 20  # of TensorRT's log, to explain a failure


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


def last_errors(log: Any) -> str:
    """The last errors that TensorRT logged, on one line."""
    return " ".join(" ".join(log.errors).split())[:600] or "it gave no reason"


@once
def log_of(target: Target) -> Any:
    """One logger for the process, because TensorRT keeps the first that it is given."""
    trt = load(target)

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        """Keeps the last errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Keep `message` if it is an error."""
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors = [*self.errors[1 - KEPT_ERRORS :], message]

    return Log()
