"""The life of one served bundle: loading, ready, draining or failed. Knows nothing about HTTP."""

import asyncio
import threading
import time
from typing import Literal, NamedTuple

from graphs.errors import MistralcError
from runtime.decoding.snapshot import fingerprint
from runtime.load import load
from runtime.scheduling.request import Stats
from runtime.scheduling.scheduler import Scheduler
from runtime.serve.errors import ApiError
from runtime.serve.jobs import Inbox, Job
from runtime.serve.metrics import Metrics
from runtime.serve.openai.calls import Call, Translator
from runtime.serve.settings import Settings
from runtime.system.malloc import one_heap
from runtime.text.tokenizer import Tokenizer

State = Literal["loading", "ready", "draining", "failed"]


class Engine(NamedTuple):
    """What requests need, made once the bundle is loaded."""

    scheduler: Scheduler
    translator: Translator
    tokenizer: Tokenizer
    fingerprint: str


class Service:
    """One bundle, loaded in the background and then served."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics(self._stats)
        self.failure: BaseException | None = None  # raised while loading
        self.draining = False
        self.created = int(time.time())
        self._engine: Engine | None = None
        self._inbox: Inbox | None = None

    @property
    def state(self) -> State:
        """The state that `/ready` reports."""
        stats = self._stats()
        if self.failure is not None or (stats is not None and stats.fault is not None):
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self._engine is None else "ready"

    def begin_to_load(self) -> None:
        """Start a thread that loads the bundle, while the event loop answers `/health`."""
        one_heap()
        self._inbox = Inbox(asyncio.get_running_loop())
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def close(self) -> None:
        """Cancel all requests and tell their clients. Waits for the step in progress."""
        if self._engine is not None:
            self._engine.scheduler.close()

    def ready(self) -> Engine:
        """Return the engine. Raises ApiError 503 unless the service is ready."""
        state = self.state
        if state == "ready" and self._engine is not None:
            return self._engine
        messages = {
            "loading": "The model is being loaded. Try again in a few seconds.",
            "draining": "The server is shutting down. Send the request to another one.",
            "failed": "The model's backend failed; the server has to be restarted.",
        }
        raise ApiError(503, messages[state], code=state)

    def start(self, call: Call) -> Job:
        """Submit the requests of `call`.

        Raises ApiError if the service is not ready, the queue is full or a request is not valid.
        """
        engine = self.ready()
        if self._inbox is None:
            raise RuntimeError("begin_to_load comes first")
        buffered = self.settings.limits.buffered_tokens
        job = Job(engine.scheduler, self._inbox, self.metrics, buffered)
        job.submit(call.requests())
        return job

    def _load(self) -> None:
        settings = self.settings
        try:
            loaded = load(
                settings.bundle, rows=settings.rows, threads=settings.threads,
                check=settings.check, require_signature=settings.require_signature,
            )  # fmt: skip
            scheduler = Scheduler.of(
                loaded,
                max_waiting=settings.limits.max_waiting,
                prefix_bytes=settings.prefix_bytes,
            )
            manifest, tokenizer = loaded.bundle.manifest, loaded.tokenizer
            translator = Translator(
                tokenizer, manifest.model.vocab_size, loaded.defaults, settings.limits
            )
            scheduler.start()
            self._engine = Engine(
                scheduler, translator, tokenizer, f"fp_{fingerprint(manifest)[:12]}"
            )
        except BaseException as error:  # `raise_failure` raises it again
            self.failure = error

    def _stats(self) -> Stats | None:
        return None if self._engine is None else self._engine.scheduler.stats()


def raise_failure(service: Service) -> None:
    """Raise the error that ended the service, if there is one."""
    if service.failure is not None:
        raise service.failure
    if service.state == "failed":
        raise MistralcError(
            "The model's backend failed while serving; its error was sent to the clients whose "
            "requests it ended. Restart the server."
        )
