"""A stand-in for Triton's Python backend: load a model of a repository and send it requests.

    python tests/support/cluster/triton_host.py REPOSITORY/NAME < REQUESTS > RESPONSES

Requests and responses are JSON. The program imports nothing of this repository, because the model
brings its own runtime. A request's "cancel_after" is the number of responses after which its client
disconnects.

Names, arguments and exceptions follow the Python backend (its README and `src/pb_stub.cc`, Triton
26.07): errors are values, not exceptions, and a closed sender must not be used again.
"""

import json
import runpy
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FINAL = 1
PATIENCE_S = 60.0


class TritonModelException(Exception):  # noqa: N818
    """The exception that the backend raises."""


class TritonError:
    """The error of a response."""

    INTERNAL, INVALID_ARG = "INTERNAL", "INVALID_ARG"
    UNAVAILABLE, CANCELLED = "UNAVAILABLE", "CANCELLED"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class Tensor:
    """A named array of numbers, or of bytes objects."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    """Output tensors or an error."""

    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def to_json(self) -> dict[str, str]:
        if self._error is not None:
            return {"error": self._error.message(), "code": self._error.code()}
        return {tensor.name(): tensor.as_numpy()[0].decode() for tensor in self._tensors}


class Sender:
    """Collects the responses of one request; `misused` if it was used after it was closed."""

    def __init__(self, cancel_after: int | None) -> None:
        self.responses: list[dict[str, str]] = []
        self.ended = threading.Event()
        self.misused = False
        self._cancel_after = cancel_after

    def is_cancelled(self) -> bool:
        self._check()
        return self._cancel_after is not None and len(self.responses) >= self._cancel_after

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        self._check()
        if response is not None:
            self.responses.append(response.to_json())
        if flags == FINAL:
            self.ended.set()

    def _check(self) -> None:
        if self.ended.is_set():
            self.misused = True
            raise TritonModelException("Unable to send response. Response sender has been closed.")


class Request:
    """The inputs of a request and its response sender."""

    def __init__(self, inputs: dict[str, Any], cancel_after: int | None) -> None:
        self._inputs = [Tensor(name, array(value)) for name, value in inputs.items()]
        self.sender = Sender(cancel_after)

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def get_response_sender(self) -> Sender:
        return self.sender


def array(value: Any) -> np.ndarray:
    """One or more values as an array; strings become bytes, as in the backend."""
    values = value if isinstance(value, list) else [value]
    if all(isinstance(one, str) for one in values):
        return np.array([one.encode() for one in values], dtype=np.object_)
    return np.array(values)


def input_by_name(request: Request, name: str) -> Tensor | None:
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


def backend_utils() -> ModuleType:
    """The `triton_python_backend_utils` module that models import."""
    module = ModuleType("triton_python_backend_utils")
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    module.get_input_tensor_by_name = input_by_name
    for one in (InferenceResponse, Tensor, TritonError, TritonModelException):
        setattr(module, one.__name__, one)
    return module


def main(model_directory: Path) -> None:
    """Execute all requests, one call each, as Triton does."""
    job = json.load(sys.stdin)
    sys.modules["triton_python_backend_utils"] = backend_utils()
    model = runpy.run_path(str(model_directory / "1" / "model.py"))["TritonPythonModel"]()
    model.initialize({"model_config": json.dumps(job["config"])})
    requests = [Request(one["inputs"], one.get("cancel_after")) for one in job["requests"]]
    for request in requests:
        model.execute([request])
    if not job.get("unload_at_once"):
        for request in requests:
            assert request.sender.ended.wait(PATIENCE_S), "no final response"
    model.finalize()
    assert all(request.sender.ended.is_set() for request in requests)
    assert not any(request.sender.misused for request in requests), "a closed sender was used"
    import runtime.load

    responses = [request.sender.responses for request in requests]
    print(json.dumps({"responses": responses, "runtime": runtime.load.__file__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
