"""The server's protection: who may connect, from which site, how many and how slowly."""

import asyncio
import hmac
import ipaddress
import json
import math
import operator
import os
import re
import socket
import traceback
from collections.abc import Callable, Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.console import complain
from engine.settings import shown

EVERYWHERE = ("0.0.0.0", "::")
# what containers call the machine that they run on
CONTAINER_NAMES = ("host.docker.internal", "host.containers.internal")
# headers: the model that answers in place of the requested one; how many messages don't fit
SUBSTITUTED, DROPPED = "x-served-model", "x-dropped-messages"
# no token is needed for the page, which asks for it
PUBLIC = ("/", "/page.css", "/page.js", "/markdown.js", "/icon.svg")

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


def own_names(host: str) -> set[str]:
    """The names, in lower case and as in a Host header, of a server at this address."""
    names = {"localhost", "127.0.0.1", "[::1]", bracketed(host.lower())} - {""}
    if host in EVERYWHERE:
        names.add(socket.gethostname().lower())
    return names


def bracketed(host: str) -> str:
    """A host as in a URL, where IPv6 addresses have brackets."""
    return f"[{host}]" if ":" in host else host


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    """Whether a host is an IP address, with or without brackets, not a name."""
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _split(host: str) -> tuple[str, str]:
    """The name and the port of a Host header; no port is an empty one."""
    if ":" not in host.rpartition("]")[2]:
        return host, ""
    name, _, port = host.rpartition(":")
    return name, port


class Guard:
    """The outermost ASGI application: refuses foreign requests, and adds security headers.

    The Host must be a name of this server, against DNS rebinding: a page that makes its own name
    lead here still sends that name. An Origin must be the server's own, or one of `origins`, which
    get CORS. If there is a token, all paths but the `public` ones, of the page's files, require it.
    Only with a token are the names known under which containers and tunnels reach this machine, and
    those in `hosts`.
    """

    def __init__(
        self,
        app: Callable,
        *,
        host: str,
        port: int,
        token: str | None,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        public: Collection[str] = PUBLIC,
    ) -> None:
        assert token is not None or not (hosts or origins), "the options are checked"
        self._app, self._host, self._port = app, host, port
        self._names = own_names(host)
        self._token = token.encode() if token else None
        self._origins, self._public = frozenset(origins), frozenset(public)
        if token is not None:
            self._names |= {*CONTAINER_NAMES, *map(bracketed, hosts)}
            if not is_loopback(host):
                own = socket.gethostname().lower()
                self._names |= {own, own.partition(".")[0]}

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin", "").lower()
        shared = cors_headers(headers, origin) if origin in self._origins else {}

        async def secured(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                added = [(k.encode(), v.encode("latin-1")) for k, v in (HEADERS | shared).items()]
                message = {**message, "headers": given + added}
            await send(message)

        try:
            self.check_place(headers)
            if shared and b"access-control-request-method" in headers:  # sent without the token
                await Response(status_code=204)(scope, receive, secured)
                return
            self.check_token(headers, scope["path"])
        except Refused as refusal:
            await refusal.response()(scope, receive, secured)
            return
        try:
            await self._app(scope, receive, secured)
        except Exception as error:  # Starlette has answered it, or the answer has started
            report(error)

    def _is_known(self, host: str) -> bool:
        """Whether a Host header means this server."""
        name, port = _split(host)
        if self._token is None:
            if port != str(self._port) and not (port == "" and self._port == 80):  # left out
                return False
            return name in self._names or (self._host in EVERYWHERE and _is_address(name))
        # a tunnel, a proxy and `docker -p` have ports of their own
        if not re.fullmatch("[0-9]{0,5}", port):
            return False
        # no page has an address or a name of the local network as its own domain
        is_near = _is_address(name) or bool(re.fullmatch(r"[a-z0-9-]+\.local", name))
        return name in self._names or (is_near and not is_loopback(self._host))

    def check_place(self, headers: Mapping[bytes, str]) -> None:
        """Raise Refused for a foreign Host or Origin."""
        host = headers.get(b"host", "").lower()
        if not self._is_known(host):
            names = ", ".join(sorted(self._names))
            way = "--allow-host NAME adds another" + ("" if self._token else ", with --token")
            said = f"this server is {names}, at port {self._port}; {way}"
            raise Refused(403, f"the Host header is {shown(host)}; {said}")
        origin = headers.get(b"origin")
        if origin is not None and origin.lower() not in (f"http://{host}", *self._origins):
            way = "--allow-origin ORIGIN lets one" + ("" if self._token else ", with --token")
            raise Refused(403, f"the Origin {shown(origin)} is another site; {way}")

    def check_token(self, headers: Mapping[bytes, str], path: str) -> None:
        """Raise Refused for a request without the token, except for the page's files."""
        if self._token is None or path in self._public:
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


def cors_headers(headers: Mapping[bytes, str], origin: str) -> dict[str, str]:
    """The headers by which a browser lets a page of this origin ask, and read the answers."""
    shared = {
        "access-control-allow-origin": headers.get(b"origin", origin),
        "access-control-expose-headers": f"{SUBSTITUTED}, {DROPPED}",
        "vary": "Origin",
    }
    if asked := headers.get(b"access-control-request-headers"):
        shared["access-control-allow-headers"] = asked
        shared["access-control-max-age"] = "600"
    if b"access-control-request-method" in headers:
        shared["access-control-allow-methods"] = "GET, POST"
    if b"access-control-request-private-network" in headers:  # from a public site to a local one
        shared["access-control-allow-private-network"] = "true"
    return shared


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
