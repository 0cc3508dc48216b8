"""The HTTP server: who may ask, how much, in what form; all else is the engine's. No path or code comes over HTTP."""

import asyncio
import contextlib
import gc
import hmac
import ipaddress
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import fastapi
import msgpack
import orjson
import pydantic
import uvicorn
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from longer_rec.bundle import Bundle, load_bundle
from longer_rec.data.request_log import RequestLog
from longer_rec.errors import ConfigError, DeadlinePassed, LongerRecError, Overloaded, ServeError
from longer_rec.model.precision import DTYPES
from longer_rec.runtime.memory import keep_freed_memory
from longer_rec.serve.engine import Engine, EngineConfig
from longer_rec.serve.histories import Histories
from longer_rec.serve.openapi import EVENTS_BODY, SCORE_BODY
from longer_rec.serve.request import Limits, encode_score, event_columns, raw_user

_NAME = r"^[A-Za-z0-9_.:@-]{1,128}$"
_JSON, _MSGPACK = "application/json", "application/msgpack"
_OPEN = ("/healthz", "/readyz")
_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_log = logging.getLogger(__name__)


class ServeConfig(EngineConfig):
    """Settings of `longer-rec serve`."""

    host: str = "127.0.0.1"
    port: int = pydantic.Field(8000, ge=0, le=65535, description="0: one that is free")
    precision: Literal["fp32", "bf16"] = pydantic.Field("fp32", description="of all matmuls but attention's")
    max_body_bytes: pydantic.ByteSize = pydantic.Field(pydantic.ByteSize(4 << 20), ge=1)
    max_events: int = pydantic.Field(20_000, ge=1, description="of one request's history")
    max_candidates: int = pydantic.Field(2_000, ge=1, description="of one request")
    time_quantum_s: int = pydantic.Field(0, ge=0, description="requests count as made at the next multiple of it")
    history_bytes: pydantic.ByteSize = pydantic.Field(pydantic.ByteSize(1 << 28), ge=0, description="of stored events")
    history_ttl_s: float = pydantic.Field(7 * 86400.0, gt=0)
    drain_s: float = pydantic.Field(10.0, ge=0, description="for requests under way when told to stop")
    log_dir: Path | None = pydantic.Field(None, description="where served requests are written as Parquet")
    instances: Path | None = pydantic.Field(None, description="the store of instances, if not where the export had it")


@dataclass(frozen=True)
class Tokens:
    """``ask`` opens everything but deleting and reloading, ``admin`` everything."""

    ask: str
    admin: str

    def allow(self, given: str, admin: bool) -> bool:
        """Compared in constant time; both always, so that the time does not tell which was close."""
        allowed = [hmac.compare_digest(given.encode(), token.encode()) for token in (self.admin, self.ask)]
        return allowed[0] or (allowed[1] and not admin)


def read_tokens(host: str, environment: Mapping[str, str]) -> Tokens | None:
    """Tokens from LONGER_REC_TOKEN and LONGER_REC_ADMIN_TOKEN; ``ConfigError`` where an address needs them."""
    ask, admin = environment.get("LONGER_REC_TOKEN", ""), environment.get("LONGER_REC_ADMIN_TOKEN", "")
    if bool(ask) != bool(admin) or (ask and ask == admin) or 0 < len(min(ask, admin, key=len)) < 16:
        raise ConfigError("LONGER_REC_TOKEN and LONGER_REC_ADMIN_TOKEN go together, differ, and have 16 characters or "
                          "more; set both or none")
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not ask and not is_loopback:
        raise ConfigError(f"host={host} can be reached from other machines; set LONGER_REC_TOKEN and "
                          "LONGER_REC_ADMIN_TOKEN, or serve on 127.0.0.1")
    return Tokens(ask, admin) if ask else None


class Server:
    """What the routes share: the engine, the stored histories, the log, the settings."""

    def __init__(self, path: Path, config: ServeConfig, tokens: Tokens | None) -> None:
        self.path, self.config, self.tokens = path, config, tokens
        self.limits = Limits(config.max_events, config.max_candidates)
        self.engine = Engine(self._load(), config)
        self.histories = Histories(config.history_bytes, config.history_ttl_s)
        self.log = RequestLog(config.log_dir) if config.log_dir else None
        self.is_closing = False
        self._reloading = asyncio.Lock()
        gauge = self.engine.metrics.gauge
        gauge("history_bytes", "of stored events").set_function(lambda: self.histories.num_bytes)
        gauge("log_lost", "calls that were not logged").set_function(lambda: self.log.num_lost if self.log else 0)
        gauge("histories_forgotten", "for want of room or use").set_function(lambda: self.histories.num_forgotten)

    def _load(self) -> Bundle:
        return load_bundle(self.path, store=self.config.instances, dtype=DTYPES[self.config.precision])

    async def score(self, body: Any, tenant: str, start: float) -> dict[str, Any]:
        """Answer one request; the deadline counts from ``start``."""
        metrics, served = self.engine.metrics, self.engine.served
        stored = None
        if isinstance(body, dict) and "history" not in body:
            user = body.get("user")
            stored = self.histories.get(served.bundle, tenant, str(user)) if isinstance(user, int | str) else None
            if stored is None and "time" in body and "candidates" in body:
                raise HTTPException(404, "the user has no stored history; send one, or its events first")
        request = encode_score(served.bundle, body, stored, self.limits, self.config.time_quantum_s)
        metrics.encode_s.observe(time.monotonic() - start)
        for kind, count in request.num_unknown.items():
            metrics.unknown.labels(kind).inc(count)
        answer = await asyncio.wrap_future(self.engine.submit(request, tenant, served))
        if self.log is not None:
            self.log.add_candidates(body, request.user, answer.logit_CY[:, 0], answer.version)
        tasks = served.bundle.schema.tasks
        metrics.request_s.observe(time.monotonic() - start)
        return {"logits": {task: answer.logit_CY[:, index].tolist() for index, task in enumerate(tasks)},
                "version": answer.version, "state": answer.source, "unknown": request.num_unknown}

    def append(self, user: str, body: Any, tenant: str) -> dict[str, Any]:
        """Add events to a user's stored history."""
        bundle = self.engine.served.bundle
        done = self.histories.append(bundle, tenant, user, body, self.config.max_events)
        self.engine.drop_user(tenant, user)
        if self.log is not None:
            self.log.add_events(body["events"], raw_user(bundle, user))
        return done

    async def reload(self) -> dict[str, Any]:
        """Change over to the bundle that lies at the server's path now; 409 and no change when it cannot be read."""
        async with self._reloading:
            old = self.engine.served.bundle
            try:
                bundle = await asyncio.to_thread(self._load)
            except LongerRecError as error:
                _log.error("version %s stays: %s", old.version, error)
                raise HTTPException(409, "the bundle cannot be read, the server's log says why; the old one stays"
                                    ) from None
            if bundle.version != old.version:
                if event_columns(bundle) != event_columns(old):
                    self.histories.clear()
                self.engine.swap(bundle)
            return {"version": bundle.version, "changed": bundle.version != old.version}

    def describe(self) -> dict[str, Any]:
        """What a client must know of the model."""
        bundle = self.engine.served.bundle
        manifest = bundle.manifest
        return {"name": manifest.name, "version": bundle.version, "tasks": bundle.schema.tasks,
                "history_columns": event_columns(bundle), "max_events": manifest.max_events,
                "user_features": [feature.name for feature in bundle.schema.user_features],
                "limits": {"events": self.limits.max_events, "candidates": self.limits.max_candidates,
                           "body_bytes": self.config.max_body_bytes, "deadline_ms": self.config.deadline_ms},
                "embeddings": manifest.embeddings, "source": manifest.source, "measured": manifest.measured}

    async def read_body(self, request: fastapi.Request) -> Any:
        """The body, decoded; its bytes are counted as they come, whatever the header says."""
        limit = self.config.max_body_bytes
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (_JSON, _MSGPACK):
            raise HTTPException(415, f"Content-Type {kind[:100]!r} is not read; send {_JSON} or {_MSGPACK}")
        declared = request.headers.get("content-length", "0")
        content = bytearray()
        if not declared.isdigit() or len(declared) > 18 or int(declared) > limit:
            raise HTTPException(413, f"a body has at most {limit} bytes", {"Connection": "close"})
        async for chunk in request.stream():
            content += chunk
            if len(content) > limit:
                raise HTTPException(413, f"a body has at most {limit} bytes", {"Connection": "close"})
        try:
            return orjson.loads(content) if kind == _JSON else msgpack.unpackb(bytes(content), strict_map_key=True)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is not {kind}: {str(error)[:200]}") from None


def create_app(server: Server, started: Callable[[], None] = lambda: None) -> fastapi.FastAPI:
    """The application; its lifespan begins with ``started`` and ends with the engine drained and the log written."""
    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
        if threading.current_thread() is threading.main_thread():
            reloads: set[asyncio.Task[None]] = set()
            asyncio.get_running_loop().add_signal_handler(
                signal.SIGHUP, lambda: reloads.add(asyncio.ensure_future(_reload_quietly(server))))
        started()
        yield
        server.is_closing = True
        await asyncio.to_thread(server.engine.close, server.config.drain_s)
        if server.log is not None:
            server.log.close()

    app = fastapi.FastAPI(title="longer-rec", lifespan=lifespan, redoc_url=None)
    User = Annotated[str, fastapi.Path(pattern=_NAME)]
    Tenant = Annotated[str, fastapi.Header(alias="X-Tenant", pattern=_NAME)]

    @app.post("/v1/score", openapi_extra=SCORE_BODY)
    async def score(request: fastapi.Request, tenant: Tenant = "default") -> fastapi.Response:
        start = time.monotonic()
        try:
            async with asyncio.timeout(server.config.deadline_ms / 1e3):
                return _reply(request, await server.score(await server.read_body(request), tenant, start))
        except TimeoutError:
            raise DeadlinePassed(f"no answer within {server.config.deadline_ms:g} ms") from None

    @app.post("/v1/users/{user}/events", openapi_extra=EVENTS_BODY)
    async def append(request: fastapi.Request, user: User, tenant: Tenant = "default") -> fastapi.Response:
        try:
            async with asyncio.timeout(server.config.deadline_ms / 1e3):
                return _reply(request, server.append(user, await server.read_body(request), tenant))
        except TimeoutError:
            raise DeadlinePassed(f"no whole body within {server.config.deadline_ms:g} ms") from None

    @app.delete("/v1/users/{user}")
    async def forget(request: fastapi.Request, user: User, tenant: Tenant = "default") -> fastapi.Response:
        known = server.histories.delete(tenant, user)
        states = server.engine.drop_user(tenant, user)
        if not known and not states:
            raise HTTPException(404, "nothing is stored of the user")
        return _reply(request, {"history": known, "states": states})

    @app.post("/v1/reload")
    async def reload(request: fastapi.Request) -> fastapi.Response:
        return _reply(request, await server.reload())

    @app.get("/v1/model")
    async def model(request: fastapi.Request) -> fastapi.Response:
        return _reply(request, server.describe())

    @app.get("/metrics")
    async def metrics() -> fastapi.Response:
        return fastapi.Response(server.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/healthz")
    async def health(request: fastapi.Request) -> fastapi.Response:
        if not server.engine.is_alive:
            raise HTTPException(503, "a thread of the engine has died; start the server again")
        return _reply(request, {"status": "ok"})

    @app.get("/readyz")
    async def ready(request: fastapi.Request) -> fastapi.Response:
        if server.is_closing:
            raise Overloaded("the server is closing; ask another one")
        return _reply(request, {"status": "ready"})

    for kind in (LongerRecError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _explain)
    app.add_middleware(Guard, server=server)
    return app


async def _reload_quietly(server: Server) -> None:
    with contextlib.suppress(HTTPException):
        await server.reload()


def _reply(request: fastapi.Request, content: dict[str, Any]) -> fastapi.Response:
    """In the form of the request."""
    if request.headers.get("content-type", "").startswith(_MSGPACK):
        return fastapi.Response(msgpack.packb(content), media_type=_MSGPACK)
    return fastapi.Response(orjson.dumps(content), media_type=_JSON)


async def _explain(request: fastapi.Request, error: Exception) -> fastapi.Response:
    """One line for every refusal, and its status."""
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
    elif isinstance(error, RequestValidationError):
        where = ".".join(map(str, error.errors()[0]["loc"]))
        status, message = 422, f"{where}: names have 1 to 128 letters, digits, or any of _ . : @ -"
    elif isinstance(error, Overloaded):
        status, message = (503 if "closing" in str(error) else 429), str(error)
        headers["Retry-After"] = "1"
    elif isinstance(error, LongerRecError):
        status, message = (504 if isinstance(error, DeadlinePassed) else 422), str(error)
    else:  # ours to mend; starlette hands it on to the log
        status, message = 500, "the server failed at this request; its log says more"
    reply = _reply(request, {"error": message})
    reply.status_code = status
    reply.headers.update(headers)
    return reply


class Guard:
    """Before every route: the Host header, the token, room in the queue; behind it: the count of replies."""

    def __init__(self, app: Any, server: Server) -> None:
        self._app, self._server = app, server

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
                       ) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = fastapi.Request(scope)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = route.path if route is not None else "none"
                self._server.engine.metrics.replies.labels(path, message["status"]).inc()
            await send(message)

        refusal = self._refusal(request)
        if refusal is not None:
            await (await _explain(request, refusal))(scope, receive, counted)
        else:
            await self._app(scope, receive, counted)

    def _refusal(self, request: fastapi.Request) -> Exception | None:
        """Why the request goes no further; a full server says so before it reads the body or looks for the route."""
        refusal = self._who(request)
        if refusal is None and request.url.path == "/v1/score":
            try:
                self._server.engine.check_room()
            except Overloaded as fault:
                return fault
        return refusal

    def _who(self, request: fastapi.Request) -> HTTPException | None:
        tokens = self._server.tokens
        if tokens is None:
            # A page in a browser on this machine must not reach the server under a name of its own.
            host = re.sub(r":\d+$", "", request.headers.get("host", ""))
            origin = request.headers.get("origin")
            is_foreign = origin is not None and origin.partition("://")[2] != request.headers.get("host")
            if host not in _LOOPBACK_HOSTS or is_foreign:
                return HTTPException(403, "without tokens the server answers programs on this machine alone")
            return None
        if request.url.path in _OPEN:
            return None
        is_admin = request.method == "DELETE" or request.url.path == "/v1/reload"
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not tokens.allow(given, is_admin):
            return HTTPException(401, f"the {'admin ' if is_admin else ''}token is missing or wrong; send "
                                 "Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        return None


def serve(path: Path, config: ServeConfig, announce: Callable[[str], None] = print) -> None:
    """Serve a bundle until SIGTERM or SIGINT; requests under way then have ``drain_s`` to end."""
    tokens = read_tokens(config.host, os.environ)
    keep_freed_memory()
    server = Server(path, config, tokens)
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off for sockets that name TCP alone; with it each answer takes 40 ms more.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((config.host, config.port))
        except OSError as error:
            raise ServeError(f"cannot serve on {config.host}:{config.port}: {error.strerror}; choose another port or "
                             "host") from None
        listener.listen(2048)
        bundle = server.engine.served.bundle
        line = (f"serving {bundle.manifest.name}, version {bundle.version}, on http://{config.host}:"
                f"{listener.getsockname()[1]}")
        http = uvicorn.Server(uvicorn.Config(
            create_app(server, lambda: announce(line)), log_level="warning", access_log=False, server_header=False,
            lifespan="on", timeout_graceful_shutdown=max(1, round(config.drain_s)), timeout_keep_alive=30,
            limit_concurrency=4 * config.max_waiting))
        # For signals before uvicorn handles them, and for those it sends itself again once it has closed.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(http, "should_exit", True))
        gc.freeze()  # half a million objects of the imports: a full collection among them stalls for 0.1 s
        http.run(sockets=[listener])
