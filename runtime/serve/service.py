"""One bundle in service: loading, ready, draining or failed. Knows no HTTP."""

import asyncio
import threading
import time
from typing import Literal, NamedTuple

from graphs.errors import MistralcError
from runtime.decoding.snapshot import fingerprint
from runtime.load import load
from runtime.scheduling.scheduler import Scheduler, Stats
from runtime.serve.errors import ApiError
from runtime.serve.jobs import Inbox, Job
from runtime.serve.metrics import Metrics
from runtime.serve.openai.calls import Call, Translator
from runtime.serve.settings import Settings
from runtime.system.malloc import one_heap
from runtime.text.tokenizer import Tokenizer

State = Literal["loading", "ready", "draining", "failed"]


class Engine(NamedTuple):
    """What is there once the bundle is loaded."""

    scheduler: Scheduler
    translator: Translator
    tokenizer: Tokenizer
    fingerprint: str


class Service:
    """The life of one loaded bundle."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics(self._stats)
        self.failure: BaseException | None = None  # why there is nothing to serve
        self.draining = False
        self.created = int(time.time())
        self._engine: Engine | None = None
        self._inbox: Inbox | None = None

    @property
    def state(self) -> State:
        """What `/ready` says."""
        stats = self._stats()
        if self.failure is not None or (stats is not None and stats.fault is not None):
            return "failed"
        if self.draining:
            return "draining"
        return "loading" if self._engine is None else "ready"

    def begin_to_load(self) -> None:
        """Load in a thread beside the event loop, which answers `/health` meanwhile."""
        one_heap()
        self._inbox = Inbox(asyncio.get_running_loop())
        threading.Thread(target=self._load, name="load", daemon=True).start()

    def close(self) -> None:
        """End everything that runs; its clients are told. Waits for the step in progress."""
        if self._engine is not None:
            self._engine.scheduler.close()

    def ready(self) -> Engine:
        """The engine; ApiError 503 where there is none to use."""
        state = self.state
        if state == "ready" and self._engine is not None:
            return self._engine
        told = {
            "loading": "The model is being loaded. Try again in some seconds.",
            "draining": "The server is shutting down. Send the request to another one.",
            "failed": "The model's backend failed; the server has to be started again.",
        }
        raise ApiError(503, told[state], code=state)

    def start(self, call: Call) -> Job:
        """Submit what `call` asks for. Raises ApiError when the queue is full or it cannot be."""
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
            manifest = loaded.bundle.manifest
            vocab_size = manifest.model.vocab_size
            scheduler = Scheduler(
                loaded.session,
                loaded.ring,
                vocab_size,
                max_waiting=settings.limits.max_waiting,
                prefix_bytes=settings.prefix_bytes,
            )
            translator = Translator(loaded.tokenizer, vocab_size, loaded.defaults, settings.limits)
            scheduler.start()
            self._engine = Engine(
                scheduler, translator, loaded.tokenizer, f"fp_{fingerprint(manifest)[:12]}"
            )
        except BaseException as error:  # the main thread raises it
            self.failure = error

    def _stats(self) -> Stats | None:
        return None if self._engine is None else self._engine.scheduler.stats()


def raise_failure(service: Service) -> None:
    """Raise what ended the service, if something did."""
    if service.failure is not None:
        raise service.failure
    if service.state == "failed":
        raise MistralcError(
            "The model's backend failed while it served; what it said was told to the clients "
            "whose requests it ended. Start the server again."
        )
