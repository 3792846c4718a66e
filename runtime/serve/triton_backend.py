"""Serve a bundle as a model of Triton Inference Server's Python backend. Knows nothing about HTTP.

`mistralc triton` writes a model repository whose `1/model.py` imports `Model` from the bundle's own
`run.pyz`. The model is decoupled: each piece of text is a response of its own. Requests share the
rows of one session, as they do in `serve`.

    execute ──▶ scheduler's thread ──▶ queue ──▶ sender's thread ──▶ responses
"""

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from triton_python_backend_utils import (
    TRITONSERVER_RESPONSE_COMPLETE_FINAL,
    InferenceResponse,
    Tensor,
    TritonError,
    TritonModelException,
    get_input_tensor_by_name,
)

from graphs.errors import MistralcError, UsageError
from runtime.decoding.sampling import Sampled
from runtime.decoding.sampling_defaults import sampling_params
from runtime.load import load
from runtime.scheduling.request import End, QueueFullError, Request, StoppedError, Ticket
from runtime.scheduling.scheduler import Scheduler
from runtime.system.malloc import one_heap
from runtime.text.text_stream import TextStream

POLL_S = 0.1  # how often each request is checked for cancellation by its client
DRAIN_S = 30.0  # time for requests to finish when the model is unloaded
PARAMETERS = ("rows", "max_waiting", "max_tokens")  # in config.pbtxt, beside Triton's own


class Stream:
    """The responses of one request. After submission only the sender's thread uses it."""

    def __init__(self, sender: Any, text: TextStream) -> None:
        self.ticket: Ticket | None = None
        self.done = False  # the last response was sent
        self._sender, self._text = sender, text

    def cancelled(self) -> bool:
        """Whether the client has cancelled the request."""
        return bool(self._sender.is_cancelled())

    def take(self, item: Sampled | End) -> None:
        """Send the text that a token completes, or the last response."""
        if self.done:  # tokens sampled after a stop string, before the scheduler was told
            return
        if isinstance(item, Sampled):
            text = self._text.push(item.token_id)
            if self._text.stopped:
                self._finish(text, "stop")
            elif text:
                self._sender.send(_response(text, ""))
        elif item.reason in ("stop", "length"):
            text = self._text.finish()
            self._finish(text, "stop" if self._text.stopped else item.reason)
        elif item.error is not None:
            self.fail(f"The model failed: {item.error}", TritonError.INTERNAL)
        else:
            self.fail(
                "The request was cancelled, by its client or because the model is unloaded.",
                TritonError.CANCELLED,
            )

    def fail(self, message: str, code: Any) -> None:
        """Send an error as the last response."""
        self.done = True
        _refuse(self._sender, message, code)

    def _finish(self, text: str, reason: str) -> None:
        self.done = True
        self._sender.send(_response(text, reason), flags=TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class Delivery(NamedTuple):
    """A token or End for a stream; None announces a new stream."""

    stream: Stream
    item: Sampled | End | None


class Model:
    """One loaded bundle; the implementation of `TritonPythonModel` in `1/model.py`."""

    def load(self, bundle: Path, config: Mapping[str, Any]) -> None:
        """Load the bundle. `config` is `config.pbtxt` as JSON.

        Raises TritonModelException if the bundle cannot be loaded.
        """
        numbers = {name: int(config["parameters"][name]["string_value"]) for name in PARAMETERS}
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._max_tokens = numbers["max_tokens"]
        one_heap()
        try:
            loaded = load(bundle, rows=numbers["rows"])
        except MistralcError as error:
            raise TritonModelException(str(error)) from error
        self._tokenizer, self._defaults = loaded.tokenizer, loaded.defaults
        self._scheduler = Scheduler.of(loaded, max_waiting=numbers["max_waiting"])
        self._queue: SimpleQueue[Delivery | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="sender", daemon=True)
        self._sender.start()
        self._scheduler.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit requests. Refusals are sent from here, all other responses by the sender."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(self._read(request), sender)
            except (QueueFullError, StoppedError) as error:
                _refuse(sender, str(error), TritonError.UNAVAILABLE)
            except MistralcError as error:
                _refuse(sender, str(error), TritonError.INVALID_ARG)

    def finalize(self) -> None:
        """Let requests finish for up to `DRAIN_S` seconds, then cancel the rest."""
        self._scheduler.drain(DRAIN_S)
        self._scheduler.close()
        self._queue.put(None)
        self._sender.join()

    def _read(self, request: Any) -> dict[str, Any]:
        """Read the given inputs, by name; an empty tensor counts as not given."""
        given: dict[str, Any] = {}
        for name in self._inputs:
            tensor = get_input_tensor_by_name(request, name)
            if tensor is not None and (array := tensor.as_numpy()).size:
                values = [_plain(name, value) for value in array.reshape(-1).tolist()]
                given[name] = values if name == "stop" else values[0]
        return given

    def _submit(self, given: dict[str, Any], sender: Any) -> None:
        chat = "messages" in given
        if chat == ("prompt" in given):
            raise UsageError("Give either prompt or messages; one of the two is expected.")
        if chat:
            ids = self._tokenizer.encode_chat(_messages(given.pop("messages")))
        else:
            ids = self._tokenizer.encode(given.pop("prompt"))
        max_tokens = given.pop("max_tokens", self._max_tokens)
        if not 1 <= max_tokens <= self._max_tokens:
            raise UsageError(f"max_tokens is {max_tokens}; 1 to {self._max_tokens} is expected.")
        stops = given.pop("stop", [])
        request = Request(
            ids=tuple(ids),
            params=sampling_params(self._defaults, given),
            max_new_tokens=max_tokens,
            stop_ids=self._tokenizer.stop_ids,
        )
        stream = Stream(sender, TextStream(self._tokenizer, stops, continuation=not chat))
        stream.ticket = self._scheduler.submit(request, partial(self._deliver, stream))
        self._queue.put(Delivery(stream, None))

    def _deliver(self, stream: Stream, item: Sampled | End) -> None:
        self._queue.put(Delivery(stream, item))

    def _send(self) -> None:
        """Run the sender's thread: sending may block, and the scheduler's thread must not."""
        streams: set[Stream] = set()
        checked = monotonic()
        while True:
            try:
                delivery = self._queue.get(timeout=POLL_S)
            except Empty:
                pass
            else:
                if delivery is None:
                    return
                self._take(delivery)
                streams.add(delivery.stream)
            if monotonic() - checked >= POLL_S:
                checked = monotonic()
                streams = {stream for stream in streams if not stream.done}
                for stream in streams:
                    if stream.ticket is not None and stream.cancelled():
                        self._scheduler.cancel(stream.ticket)

    def _take(self, delivery: Delivery) -> None:
        stream, item = delivery
        if item is None:
            return
        try:
            stream.take(item)
        except Exception as error:  # affects this request only
            with suppress(Exception):  # Triton may no longer know the request
                stream.fail(f"The answer could not be sent: {error}", TritonError.INTERNAL)
        if stream.done and stream.ticket is not None:
            self._scheduler.cancel(stream.ticket)


def _plain(name: str, value: Any) -> Any:
    """Decode a string; return a number unchanged."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 ({error}); send text in UTF-8.") from error


def _messages(text: str) -> list[dict[str, str]]:
    """Parse the messages of a chat from JSON."""
    try:
        messages = json.loads(text)
        return [
            {name: _text(message[name]) for name in ("role", "content")} for message in messages
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(
            f"messages is {text!r:.100}; a JSON list of objects with the texts role and content "
            "is expected."
        ) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _response(text: str, reason: str) -> Any:
    """Make a response of one piece of text; `reason` is "" for all but the last."""
    outputs = {"text": text, "finish_reason": reason}
    return InferenceResponse(
        output_tensors=[
            Tensor(name, np.array([value.encode()], dtype=np.object_))
            for name, value in outputs.items()
        ]
    )


def _refuse(sender: Any, message: str, code: Any) -> None:
    response = InferenceResponse(output_tensors=[], error=TritonError(message, code))
    sender.send(response, flags=TRITONSERVER_RESPONSE_COMPLETE_FINAL)
