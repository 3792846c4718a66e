"""Serve one bundle from N replicas with Ray Serve. Knows nothing about requests.

    serve run runtime.serve.ray_app:app bundle=/srv/BUNDLE replicas=2

Each replica is the server of `mistralc serve` without its socket. Ray's proxy listens instead and
sends each request to the less busy of two replicas. A replica gets requests once its bundle is
loaded and checked, and no more once it drains or is found dead.
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

REPLICA_HEADER = "mistralc-replica"  # in every response: the replica that sent it
LOADING_POLL_S = 0.05
HEALTH_PERIOD_S = 5.0  # how often Ray checks for a failed backend
DRAIN_POLL_S = 0.5
MAX_STARTS = 3  # if the bundle cannot be loaded, Ray gives up after these
SPARE = 64  # requests beyond the running and waiting ones: /health, /metrics and refused ones


class Arguments(BaseModel):
    """Arguments: NAME=VALUE for `serve run`, or `args` in a Ray Serve configuration.

    `bundle` is at the same path on every node. Ray reserves `cpus` and `gpus` for each replica;
    `cpus` is also its number of threads.
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
    def _reject_unknown(cls, given: Any) -> Any:
        """Reject unknown limits, which pydantic would ignore."""
        unknown = (
            set(given) - {field.name for field in fields(Limits)} if isinstance(given, dict) else ()
        )
        if unknown:
            raise ValueError(f"there is no limit {', '.join(sorted(unknown))}")
        return given

    def settings(self) -> Settings:
        """Return the settings of a replica. Raises UsageError if the keys cannot be read."""
        bundle = self.bundle.absolute()  # a replica runs in a directory of Ray's
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
    """The ASGI application of one replica. It names the replica in every response."""

    def __init__(self, settings: Settings, replica: str) -> None:
        self.service = Service(settings)
        self._gate = Gate(
            make_app(self.service),
            limits=settings.limits,
            api_keys=settings.api_keys,
            metrics=self.service.metrics,
        )
        self._replica_header = (REPLICA_HEADER.encode(), replica.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or handle the application's startup and shutdown."""

        async def with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], self._replica_header]}
            await send(message)

        await self._gate(scope, receive, with_header)


class Replica:
    """What Ray calls on a replica beside requests. Ray sets `app`, its Server."""

    app: Any

    async def check_health(self) -> None:
        """Raise the error that ended the service, if there is one.

        Ray sends no request before the first check has returned, so it waits for loading.
        """
        while self.app.service.state == "loading":
            await asyncio.sleep(LOADING_POLL_S)
        raise_failure(self.app.service)

    def __del__(self) -> None:
        """End the scheduler's thread. Ray calls this once the replica has drained."""
        server = getattr(self, "app", None)  # not set if it could not be made
        if server is not None:
            server.service.close()


def app(arguments: Arguments) -> Any:
    """Build the application for `serve run` and `serve deploy`."""
    settings, limits = arguments.settings(), arguments.limits

    def server() -> Server:
        return Server(settings, serve.get_replica_context().replica_id.unique_id)

    deployment = serve.deployment(
        serve.ingress(server)(Replica),
        name="mistralc",
        num_replicas=arguments.replicas,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
        # More than a replica accepts, so that the replica answers 429 itself, as one server does.
        max_ongoing_requests=arguments.rows + limits.max_waiting + SPARE,
        graceful_shutdown_timeout_s=limits.drain_s,
        graceful_shutdown_wait_loop_s=min(DRAIN_POLL_S, limits.drain_s),
        health_check_period_s=HEALTH_PERIOD_S,
        max_constructor_retry_count=MAX_STARTS,
    )
    return deployment.bind()
