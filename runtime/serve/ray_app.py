"""One bundle in N replicas of a Ray Serve application. Knows Ray, and nothing about requests.

    serve run runtime.serve.ray_app:app bundle=/srv/BUNDLE replicas=2

Each replica is the server of `mistralc serve` without its socket: that is Ray's proxy, which sends
a request to the replica with the fewest. A replica is not sent any before its bundle is loaded and
checked, and none any more once it drains or was found dead.
"""

import asyncio
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from starlette.types import Message, Receive, Scope, Send

from runtime.serve.app import make_app
from runtime.serve.limits import Gate
from runtime.serve.service import Service, raise_failure
from runtime.serve.settings import PREFIX_BYTES, Limits, Settings, read_api_keys

REPLICA_HEADER = "mistralc-replica"  # of every response: which replica it is from
LOADING_POLL_S = 0.05
HEALTH_PERIOD_S = 5.0  # a failed backend is found at the latest after so long
DRAIN_POLL_S = 0.5
STARTS = 3  # of a replica whose bundle cannot be loaded; then Ray gives the application up
SPARE = 64  # requests beyond those that run or wait: /health, /metrics, and those to be refused


class Arguments(BaseModel):
    """What `serve run` takes as NAME=VALUE, and a Ray Serve configuration as `args`.

    `bundle` lies at this path on every node. `cpus` and `gpus` are what Ray sets aside for a
    replica; on the CPU they are its threads, too.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: Path
    replicas: int = Field(default=1, ge=1)
    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)
    rows: int = Field(default=8, ge=1)
    model_name: str | None = None
    api_key_file: Path | None = None
    prefix_bytes: int = Field(default=PREFIX_BYTES, ge=0)
    check: bool = True
    require_signature: Path | None = None
    limits: Limits = Limits()

    @field_validator("limits", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """Refuse unknown limits; pydantic would ignore them, and nothing be limited."""
        unknown = (
            set(given) - {one.name for one in fields(Limits)} if isinstance(given, dict) else ()
        )
        if unknown:
            raise ValueError(f"there is no limit {', '.join(sorted(unknown))}")
        return given

    def settings(self) -> Settings:
        """The same for the server of a replica; reads the keys. Raises UsageError."""
        bundle = self.bundle.absolute()  # a replica's working directory is Ray's
        return Settings(
            bundle=bundle,
            model=self.model_name or bundle.resolve().name,
            rows=self.rows,
            threads=self.cpus,
            prefix_bytes=self.prefix_bytes,
            check=self.check,
            require_signature=self.require_signature and self.require_signature.absolute(),
            api_keys=read_api_keys(self.api_key_file),
            limits=self.limits,
        )


class Server:
    """The ASGI application of one replica, made where it runs; signs every response."""

    def __init__(self, settings: Settings, replica: str) -> None:
        self.service = Service(settings)
        self._gate = Gate(
            make_app(self.service),
            limits=settings.limits,
            api_keys=settings.api_keys,
            metrics=self.service.metrics,
        )
        self._signature = (REPLICA_HEADER.encode(), replica.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the application's start and end."""

        async def signed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], self._signature]}
            await send(message)

        await self._gate(scope, receive, signed)


class Replica:
    """What Ray asks of a replica beside requests. `app` is its Server, put here by Ray."""

    app: Any

    async def check_health(self) -> None:
        """Raise what ended the service. The first check, before any request, waits for loading."""
        while self.app.service.state == "loading":
            await asyncio.sleep(LOADING_POLL_S)
        raise_failure(self.app.service)

    def __del__(self) -> None:
        """End the scheduler's thread; Ray calls this when the replica has drained."""
        server = getattr(self, "app", None)  # none where it could not be made
        if server is not None:
            server.service.close()


def app(arguments: Arguments) -> Any:
    """The application, as `serve run` and `serve deploy` ask for it."""
    settings, limits = arguments.settings(), arguments.limits

    def server() -> Server:
        return Server(settings, serve.get_replica_context().replica_id.unique_id)

    deployment = serve.deployment(
        serve.ingress(server)(Replica),
        name="mistralc",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        # Above what a replica takes, so that it is the one to say 429, as one server does.
        max_ongoing_requests=arguments.rows + limits.max_waiting + SPARE,
        graceful_shutdown_timeout_s=limits.drain_s,
        graceful_shutdown_wait_loop_s=min(DRAIN_POLL_S, limits.drain_s),
        health_check_period_s=HEALTH_PERIOD_S,
        max_constructor_retry_count=STARTS,
    )
    return deployment.bind()
