"""The endpoints of scripts.watch: the runs as events, a stop, and writing with what trains."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from engine.processor import default_threads
from exchange.saved_run import load_run
from scripts.serving.app import Application, read_body, route
from scripts.serving.guard import Guard, Refused, json_response, to_json
from scripts.serving.protocol import Served, parse_object
from scripts.serving.writer import Writer
from scripts.watching.curves import Sent
from scripts.watching.runs import Run, Runs

HERE = Path(__file__).resolve().parent
SERVING = HERE.parent / "serving"
FILES = {
    "/": (HERE / "page.html", "text/html; charset=utf-8"),
    "/watch.css": (HERE / "watch.css", "text/css; charset=utf-8"),
    "/watch.js": (HERE / "watch.js", "text/javascript; charset=utf-8"),
    "/page.css": (SERVING / "page.css", "text/css; charset=utf-8"),  # colours and controls
    "/icon.svg": (SERVING / "icon.svg", "image/svg+xml"),
}
EVERY_S = 1.0  # between two looks at the runs
BEAT_S = 15.0  # after which an event is sent in any case: a reader that is gone is found so
MOST_STREAMS = 40  # of events, at the same time
ANSWER_LIMIT = 400  # tokens
QUEUE_LIMIT = 4  # texts that wait to be written


class Desk:
    """Writes with one run's newest weights at a time: those of the last request stay loaded."""

    def __init__(self, device: str | None) -> None:
        self._device = device
        self._lock = asyncio.Lock()
        self._key: tuple[Path, str, int] | None = None
        self._application: Application | None = None
        self._writer: Writer | None = None

    async def application(self, run: Run) -> Application:
        """What completes texts with a run's newest weights, loaded if they are not yet.

        Raises Refused, with 409, before the run has saved any; PipelineError as load_run() does.
        """
        async with self._lock:
            found = run.newest_weights()
            if found is None:
                raise Refused(409, f"{run.path.name} has saved no weights yet: wait for the first")
            key = (run.path, *found)
            if self._application is None or key != self._key:
                await self._leave()
                await asyncio.to_thread(self._load, run, found[0])
                self._key = key
            assert self._application is not None
            return self._application

    def _load(self, run: Run, which: str) -> None:
        # few threads, for the run needs them; on a GPU it needs the memory, so this is on the CPU
        torch.set_num_threads(max(1, default_threads() // 4))
        loaded = load_run(run.path, which=which, device=self._device)
        sampling = dataclasses.asdict(loaded.sampling)
        served = Served(
            model=loaded.name,
            aliases=(),
            created=0,
            fingerprint=loaded.version,
            tokenizer=loaded.tokenizer,
            sampling=sampling | {"max_new_tokens": min(sampling["max_new_tokens"], ANSWER_LIMIT)},
            seed=None,
            answer_limit=ANSWER_LIMIT,
        )
        self._writer = Writer(loaded, QUEUE_LIMIT)
        self._application = Application(loaded, served, self._writer)

    async def _leave(self) -> None:
        """Let go of the weights, once what is written with them is."""
        writer, self._application, self._writer = self._writer, None, None
        if writer is not None:
            await asyncio.to_thread(writer.close)

    def stop(self) -> None:
        """Cancel what is being written."""
        if self._writer is not None:
            self._writer.stop()

    def close(self) -> None:
        """Wait for the writing thread to end."""
        if self._writer is not None:
            self._writer.close()


class Events:
    """An endless answer: what is new of all runs, and of a chosen one, as server-sent events."""

    def __init__(self, watch: "Watch", chosen: Run | None) -> None:
        self._watch, self._chosen = watch, chosen
        self._sent = Sent()
        self._shown: dict[str, Any] = {}

    async def __call__(self, scope: Any, receive: Callable, send: Callable) -> None:
        with self._watch.streaming():
            gone = asyncio.create_task(_until_gone(receive))
            closing = asyncio.create_task(self._watch.closing.wait())
            headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                idle_s = BEAT_S
                while not (gone.done() or closing.done()):
                    event = await asyncio.to_thread(self._news)
                    idle_s += EVERY_S
                    if event or idle_s >= BEAT_S:
                        body, idle_s = b"data: " + to_json(event) + b"\n\n", 0.0
                        await send({"type": "http.response.body", "body": body, "more_body": True})
                    await asyncio.wait(
                        (gone, closing), timeout=EVERY_S, return_when=asyncio.FIRST_COMPLETED
                    )
            finally:
                gone.cancel()
                closing.cancel()
            with contextlib.suppress(OSError):  # the reader is gone
                await send({"type": "http.response.body", "body": b""})

    def _news(self) -> dict[str, Any]:
        """What has changed since the last event; empty if nothing has."""
        found: dict[str, Any] = {"runs": self._watch.runs.lines()}
        if self._chosen is not None:
            found |= {f"run.{name}": value for name, value in self._chosen.detail().items()}
        news = {n: v for n, v in found.items() if n not in self._shown or self._shown[n] != v}
        self._shown = found
        event = {name: value for name, value in news.items() if not name.startswith("run.")}
        detail = {n.removeprefix("run."): v for n, v in news.items() if n.startswith("run.")}
        if self._chosen is not None:
            curves, self._sent = self._chosen.news(self._sent)
            detail |= {"curves": curves} if curves else {}
        return event | ({"run": detail} if detail else {})


async def _until_gone(receive: Callable) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Watch:
    """The endpoints of a server that watches the runs in a folder."""

    def __init__(self, folder: Path, device: str | None) -> None:
        self.runs = Runs(folder)
        self.closing = asyncio.Event()
        self._desk = Desk(device)
        self._n_streams = 0

    def guarded(self, *, host: str, port: int, token: str, hosts: Collection[str]) -> Guard:
        """The guarded ASGI application for an address, with other names let in."""
        routes = [
            *(Route(path, self.file) for path in FILES),
            Route("/events", self.events),
            Route("/stop", self.stop_run, methods=["POST"]),
            Route("/write", self.write, methods=["POST"]),
        ]
        app = route(routes, "the page is at /")
        return Guard(app, host=host, port=port, token=token, hosts=hosts, public=FILES)

    async def file(self, request: Request) -> Response:
        """The page and its files."""
        path, media_type = FILES[request.url.path]
        return Response(path.read_bytes(), media_type=media_type)

    async def events(self, request: Request) -> Any:
        """/events?run=NAME: all runs, and the named one with its curves, as they change."""
        name = request.query_params.get("run")
        chosen = None if name is None else await self._run(name)
        if self._n_streams >= MOST_STREAMS:
            raise Refused(429, f"{MOST_STREAMS} pages are open already; close one of them")
        return Events(self, chosen)

    async def stop_run(self, request: Request) -> Response:
        """/stop: ask the process that trains a run to save and stop."""
        run = await self._run_in_body(request)
        if not await asyncio.to_thread(run.ask_to_stop):
            raise Refused(409, f"{run.path.name} does not train on this machine")
        return json_response({"stopping": run.path.name})

    async def write(self, request: Request) -> Any:
        """/write?run=NAME: a completion, in OpenAI's shapes, by the newest weights of a run."""
        run = await self._run(request.query_params.get("run", ""))
        self._require_json(request)
        return await (await self._desk.application(run)).complete(request)

    async def _run_in_body(self, request: Request) -> Run:
        self._require_json(request)
        name = parse_object(await read_body(request)).get("run")
        if not isinstance(name, str):
            raise Refused(400, 'the body must have "run", the name of a run', param="run")
        return await self._run(name)

    async def _run(self, name: str) -> Run:
        """The run of a name; Refused, with 404, if there is none."""
        run = await asyncio.to_thread(self.runs.find, name)
        if run is None:
            raise Refused(404, "there is no run of this name here", param="run")
        return run

    def _require_json(self, request: Request) -> None:
        """Raise Refused, with 415, for a body that a form of another site could send."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "the body must be JSON, with the header content-type saying so")

    @contextlib.contextmanager
    def streaming(self) -> Any:
        """Count a stream of events while it lasts."""
        self._n_streams += 1
        try:
            yield
        finally:
            self._n_streams -= 1

    def stop(self) -> None:
        """End all streams of events and all writing."""
        self.closing.set()
        self._desk.stop()

    def close(self) -> None:
        """Wait for the writing thread to end."""
        self._desk.close()
