"""The server's protection: who may connect, from which site, how many and how slowly."""

import asyncio
import hmac
import ipaddress
import json
import math
import operator
import os
import socket
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.console import complain
from engine.settings import shown

EVERYWHERE = ("0.0.0.0", "::")
# no token is needed for the page, which asks for it
PUBLIC = ("/", "/page.css", "/page.js", "/icon.svg")

MOST_CONNECTIONS = 200  # macOS allows a program 256 open files
REQUEST_SECONDS = 15.0  # for a request to arrive
STALLED_SECONDS = 30.0  # for a client to continue reading

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request that is refused, with the status and the error of the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """The answer that refuses."""
        return json_response(self.body(), self.status, self.headers)


def to_json(value: Any) -> bytes:
    """JSON as UTF-8; a lone surrogate, which UTF-8 can't encode, is escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON answer; Starlette's own JSONResponse fails on lone surrogates."""
    return Response(to_json(content), status, headers, "application/json")


def report(error: Exception) -> None:
    """Print to standard error what failed and where, but nothing of the request or the answer."""
    if os.environ.get("GPT_DEBUG") == "1":
        complain("".join(traceback.format_exception(error)))
        return
    place = traceback.extract_tb(error.__traceback__)[-1]
    complain(
        f"a request failed: {type(error).__name__} in {Path(place.filename).name} line "
        f"{place.lineno}; GPT_DEBUG=1 shows more"
    )


def own_names(host: str, port: int) -> set[str]:
    """The Host headers, in lower case, that mean a server at this address."""
    names = {"localhost", "127.0.0.1", "[::1]", bracketed(host.lower())}
    if host in EVERYWHERE:
        names.add(socket.gethostname().lower())
    return {f"{name}:{port}" for name in names} | (names if port == 80 else set())


def bracketed(host: str) -> str:
    """A host as in a URL, where IPv6 addresses have brackets."""
    return f"[{host}]" if ":" in host else host


def _is_address(host: str, port: int) -> bool:
    """Whether a Host header is an IP address, not a name, with this port."""
    if port == 80 and ":" not in host.rpartition("]")[2]:  # browsers omit it
        host += ":80"
    name, _, given_port = host.rpartition(":")
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return given_port == str(port)


class Guard:
    """The outermost ASGI application: refuses foreign requests, and adds security headers.

    The Host must be a name of this server, against DNS rebinding. An Origin must be the server's
    own. If there is a token, all but the page's files require it.
    """

    def __init__(self, app: Callable, *, host: str, port: int, token: str | None) -> None:
        self._app, self._host, self._port = app, host, port
        self._names = own_names(host, port)
        self._token = token.encode() if token else None

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        async def secured(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": given + added}
            await send(message)

        try:
            self.check(scope)
        except Refused as refusal:
            await refusal.response()(scope, receive, secured)
            return
        try:
            await self._app(scope, receive, secured)
        except Exception as error:  # Starlette has answered it, or the answer has started
            report(error)

    def check(self, scope: dict[str, Any]) -> None:
        """Raise Refused for a request with a foreign Host or Origin, or without the token."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").lower()
        anywhere = self._host in EVERYWHERE and _is_address(host, self._port)
        if host not in self._names and not anywhere:
            names = ", ".join(sorted(self._names))
            raise Refused(403, f"the Host header is {shown(host)}; this server is {names}")
        origin = headers.get(b"origin")
        if origin is not None and origin.lower() != f"http://{host}":
            raise Refused(403, f"the Origin {shown(origin)} is another site; none may ask here")
        if self._token is None or scope["path"] in PUBLIC:
            return
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1"), self._token)
        if scheme.lower() != "bearer" or not right:
            raise Refused(
                401,
                "this server needs its token, as the header Authorization: Bearer TOKEN "
                "(the API key of OpenAI's clients)",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with limits for slow senders, slow readers and many connections.

    A request with its body must arrive within REQUEST_SECONDS. Beyond MOST_CONNECTIONS, the
    connection that has been sending its request for longest is aborted.
    """

    expecting_since = math.inf  # the loop's time; infinite while no request is arriving

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._expect_request()
        if len(self.connections) > MOST_CONNECTIONS:
            oldest: Any = min(self.connections, key=operator.attrgetter("expecting_since"))
            oldest.transport.abort()
            self.connections.discard(oldest)  # connection_lost() is called a moment later

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        for timer in self._timers.values():
            timer.cancel()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
            self.expecting_since = math.inf
            self._timers["request"].cancel()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_timer("reading", STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if "reading" in self._timers:
            self._timers["reading"].cancel()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and self.cycle.response_started:
            self.transport.abort()  # an answer has started, and can't be replaced
        else:
            super().send_400_response(msg)

    def _expect_request(self) -> None:
        self.expecting_since = self.loop.time()
        self._set_timer("request", REQUEST_SECONDS, self._end)

    def _end(self) -> None:
        """Close the connection; abort it if the client does not read the rest."""
        self.transport.close()
        self._set_timer("request", STALLED_SECONDS, self.transport.abort)

    def _set_timer(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = self.loop.call_later(seconds, action)
