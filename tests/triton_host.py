"""A stand-in for Triton's Python backend: loads a model repository's model and sends it requests.

    python tests/triton_host.py REPOSITORY/NAME < REQUESTS > RESPONSES

Requests and responses are JSON. It stands alone: the model brings its own runtime, which no other
may be mistaken for. A request's "cancel_after" is after how many responses its client leaves.
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


class Tensor:
    """A named array, as `pb_utils.Tensor`."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


class InferenceResponse:
    """Output tensors, or an error."""

    def __init__(self, output_tensors: list[Tensor], error: Exception | None = None) -> None:
        self.tensors, self.error = output_tensors, error


class Sender:
    """Collects the responses of one request; none may follow the last."""

    def __init__(self, cancel_after: int | None) -> None:
        self.responses: list[dict[str, Any]] = []
        self.ended = threading.Event()
        self._cancel_after = cancel_after

    def is_cancelled(self) -> bool:
        return self._cancel_after is not None and len(self.responses) >= self._cancel_after

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.ended.is_set(), "a response after the last"
        if response is not None:
            told = {tensor.name: tensor.array[0].decode() for tensor in response.tensors}
            if response.error is not None:
                told = {"error": str(response.error)}
            self.responses.append(told)
        if flags == FINAL:
            self.ended.set()


class Request:
    """Inputs by name, and their sender."""

    def __init__(self, inputs: dict[str, Any], cancel_after: int | None) -> None:
        self.inputs = {name: Tensor(name, array(value)) for name, value in inputs.items()}
        self.sender = Sender(cancel_after)

    def get_response_sender(self) -> Sender:
        return self.sender


def array(value: Any) -> np.ndarray:
    """A value, or several, as the backend gives them: strings as bytes."""
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], str):
        return np.array([one.encode() for one in values], dtype=np.object_)
    return np.array(values)


def backend_utils() -> ModuleType:
    """The module that models import."""
    module = ModuleType("triton_python_backend_utils")
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    module.InferenceResponse, module.Tensor = InferenceResponse, Tensor
    module.TritonError = type("TritonError", (Exception,), {})
    module.TritonModelException = type("TritonModelException", (Exception,), {})
    module.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    return module


def main(model_directory: Path) -> None:
    """All requests at once, as Triton would hand them over one after the other."""
    asked = json.load(sys.stdin)
    sys.modules["triton_python_backend_utils"] = backend_utils()
    model = runpy.run_path(str(model_directory / "1" / "model.py"))["TritonPythonModel"]()
    model.initialize({"model_config": json.dumps(asked["config"])})
    requests = [Request(one["inputs"], one.get("cancel_after")) for one in asked["requests"]]
    for request in requests:
        model.execute([request])
    if not asked.get("unload_at_once"):
        for request in requests:
            assert request.sender.ended.wait(PATIENCE_S), "no last response"
    model.finalize()
    assert all(request.sender.ended.is_set() for request in requests)
    import runtime.load

    told = [request.sender.responses for request in requests]
    print(json.dumps({"responses": told, "runtime": runtime.load.__file__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
