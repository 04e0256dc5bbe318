"""The server's endpoints: OpenAI's API, the page and its files."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from engine.console import say, tell
from engine.errors import PipelineError
from engine.settings import shown
from exchange.saved_run import LoadedModel
from scripts.serving.guard import (
    DROPPED,
    SUBSTITUTED,
    Guard,
    Refused,
    TimedProtocol,
    json_response,
    report,
    to_json,
)
from scripts.serving.protocol import (
    MOST_IGNORED,
    Answer,
    Order,
    Served,
    check_model,
    read_order,
    render_order,
)
from scripts.serving.writer import Job, Writer, watched

MOST_BODY_BYTES = 1_000_000
SECONDS_TO_END = 3
HERE = Path(__file__).resolve().parent
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/markdown.js": ("markdown.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


def as_refusal(error: Exception) -> Refused:
    """The refusal that tells a client of an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, PipelineError):
        return Refused(500, str(error))
    return Refused(500, f"the server failed ({type(error).__name__})")


def route(routes: Sequence[Route], others: str) -> Starlette:
    """The application of some routes, whose errors are answers in OpenAI's shape.

    others says what there is, to a request for another path or with another method. An error that
    nobody expects is raised again behind its answer, so that the Guard reports it.
    """

    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # the router's
            said = f"there is no {request.method} {request.url.path} here; {others}"
            error = Refused(error.status_code, said, headers=error.headers)
        return as_refusal(error).response()

    async def answer_nobody(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # the client is gone, and reads nothing

    handlers: dict[Any, Any] = dict.fromkeys(
        (Refused, PipelineError, HTTPException, Exception), refuse
    )
    handlers[ClientDisconnect] = answer_nobody
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


class EventStream:
    """An answer as server-sent events, one per chunk."""

    def __init__(
        self, writer: Writer, job: Job, answer: Answer, headers: Mapping[str, str]
    ) -> None:
        self._writer, self._job, self._answer, self._headers = writer, job, answer, headers

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        async def send_event(data: bytes) -> None:
            body = b"data: " + data + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})

        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        headers += [(name.encode(), value.encode()) for name, value in self._headers.items()]
        async with watched(self._writer, self._job, receive):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for chunk in self._chunks():
                    await send_event(to_json(chunk))
                await send_event(b"[DONE]")
            except ClientDisconnect:
                return
            except Exception as error:  # the status is sent already, so the stream has the error
                if not isinstance(error, Refused | PipelineError):
                    report(error)
                await send_event(to_json(as_refusal(error).body()))
        await send({"type": "http.response.body", "body": b""})

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        for chunk in self._answer.opening():
            yield chunk
        async for part in self._job.parts():
            if (added := self._answer.chunk(part)) is not None:
                yield added
        for chunk in self._answer.closing(self._job.n_prompt_tokens):
            yield chunk


async def read_body(request: Request) -> bytes:
    """The body of a request; Refused, with 413, as soon as it is too long."""
    too_long = Refused(413, f"the body is too long: {MOST_BODY_BYTES} bytes at most")
    if int(request.headers.get("content-length", 0)) > MOST_BODY_BYTES:
        raise too_long
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            raise too_long
    return bytes(body)


class Application:
    """The endpoints of a server for one model."""

    def __init__(self, run: LoadedModel, served: Served, writer: Writer) -> None:
        self._run, self._served, self._writer = run, served, writer
        self._facts = {"id": served.model, "object": "model", "created": served.created}
        self._facts["owned_by"] = "you"
        self._noted: set[str] = set()
        self._rendering = asyncio.Lock()

    def guarded(
        self,
        *,
        host: str,
        port: int,
        token: str | None,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
    ) -> Guard:
        """The guarded ASGI application for an address, with other names and sites let in."""
        routes = [
            *(Route(path, self.file) for path in FILES),
            Route("/run.json", self.run_facts),
            Route("/training_losses.png", self.picture),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        others = "see /v1/models, /v1/completions, /v1/chat/completions and the page at /"
        app = route(routes, others)
        return Guard(app, host=host, port=port, token=token, hosts=hosts, origins=origins)

    async def complete(self, request: Request) -> Any:
        """/v1/completions and /v1/chat/completions."""
        is_chat = request.url.path.endswith("/chat/completions")
        order = read_order(await read_body(request), self._served, is_chat=is_chat)
        if order.messages:
            async with self._rendering:  # one at a time: it takes the processor
                self._writer.check_room()  # of a flood of requests none is rendered
                order = await asyncio.to_thread(render_order, order, self._served)
        job = self._writer.submit(order)
        self._note(order.ignored)
        answer = Answer(order, self._served)
        headers = self._headers(order)
        if order.stream:
            return EventStream(self._writer, job, answer, headers)
        async with watched(self._writer, job, request.receive):
            async for part in job.parts():
                answer.add(part)
        return json_response(answer.whole(job.n_prompt_tokens), headers=headers)

    def _headers(self, order: Order) -> dict[str, str]:
        """What an answer's headers say of its request; they have ASCII only."""
        headers = {}
        if order.is_substitute:
            headers[SUBSTITUTED] = quote(self._served.model)
        if order.n_dropped:
            headers[DROPPED] = str(order.n_dropped)
        return headers

    def _note(self, ignored: Iterable[str]) -> None:
        """Print a line for each ignored parameter, the first time that it comes."""
        for name in ignored:
            if name not in self._noted and len(self._noted) < MOST_IGNORED:
                self._noted.add(name)
                tell(f"Note: requests have {shown(name)}, which this server does not know: ignored")

    async def models(self, request: Request) -> Response:
        """/v1/models: the run as the only model."""
        return json_response({"object": "list", "data": [self._facts]})

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME: the run, by any of its names."""
        check_model(request.path_params["name"], self._served)
        return json_response(self._facts)

    async def file(self, request: Request) -> Response:
        """The page and its files."""
        name, media_type = FILES[request.url.path]
        return Response((HERE / name).read_bytes(), media_type=media_type)

    async def picture(self, request: Request) -> Response:
        """The picture of the run's losses; read each time, for the run may be training."""
        try:
            picture = self._read("training_losses.png")
        except FileNotFoundError:
            raise Refused(404, "there is no picture of this model's losses") from None
        return Response(picture, media_type="image/png")

    async def run_facts(self, request: Request) -> Response:
        """What the page shows of the run, and the defaults of its controls."""
        run, served = self._run, self._served
        summary, data = self._facts_in("summary.json"), self._facts_in("data.json")
        names = [Path(file["name"]).name for file in data.get("files", [])]
        length = served.answer_length or served.sampling["max_new_tokens"]
        sampling = served.sampling | {"max_new_tokens": length}
        facts = {
            "name": served.model,
            "step": run.step,
            "weights": run.weights,
            "device": str(run.device),
            "parameters": run.n_parameters,
            "context_length": run.model.config.context_length,
            "tokenizer": run.tokenizer.name,
            "final_train_loss": summary.get("final_train_loss"),
            "final_val_loss": summary.get("final_val_loss"),
            "text": names[:3],
            "more_texts": len(names[3:]),
            "text_tokens": data.get("tokens"),
            "sampling": sampling,
            "converses": served.converser is not None,
            "seed": served.seed,
            "answer_limit": served.answer_limit,
        }
        return json_response(facts)

    def _facts_in(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; empty if it doesn't exist."""
        try:
            return json.loads(self._read(name))
        except FileNotFoundError:
            return {}

    def _read(self, name: str) -> bytes:
        """A file of the run; FileNotFoundError if there is none, or the model is no run."""
        if self._run.path is None:
            raise FileNotFoundError(name)
        return (self._run.path / name).read_bytes()


class Stoppable(Protocol):
    """What has answers under way, which it ends when the server is stopped."""

    def stop(self) -> None:
        """End them."""


class Server(uvicorn.Server):
    """uvicorn's server; it announces when it is ready, and cancels all jobs at shutdown."""

    def __init__(self, app: Guard, writer: Stoppable, greeting: str) -> None:
        self._writer, self._greeting = writer, greeting
        super().__init__(
            uvicorn.Config(
                app,
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,  # it would contain the clients' URLs
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=SECONDS_TO_END,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and announce it."""
        await super().startup(sockets=sockets)
        say(self._greeting)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cancel all jobs, then shut down."""
        self._writer.stop()
        await super().shutdown(sockets=sockets)
