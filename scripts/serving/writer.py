"""The server's queue of orders, and the thread that generates their texts one by one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import torch
from starlette.requests import ClientDisconnect

from engine.processor import prepare_processor
from exchange.saved_run import LoadedRun
from generation import Piece, stream_text
from scripts.serving.guard import Refused
from scripts.serving.protocol import Order

RETRY_SECONDS = 2


class Job:
    """An order in the queue, and its results."""

    def __init__(self, order: Order) -> None:
        self.order: Order | None = order  # None once it is cancelled in the queue
        self.n_prompt_tokens = 0
        self.cancelled = False  # checked between two tokens
        self.future: Future[None] | None = None
        self.events: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces as they are drawn; raises an error of the thread, or ClientDisconnect."""
        while (event := await self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
        if self.cancelled:
            raise ClientDisconnect


class Writer:
    """Generates the texts of orders in a thread, one by one; a limited number may wait."""

    def __init__(self, run: LoadedRun, queue_limit: int) -> None:
        self._run, self._queue_limit = run, queue_limit
        self._jobs: set[Job] = set()
        # prepare_processor() sets the handling of denormal numbers for its own thread only
        self._thread = ThreadPoolExecutor(1, "generation", initializer=prepare_processor)

    def submit(self, order: Order) -> Job:
        """Queue an order; Refused, with 429, if too many are waiting."""
        if len(self._jobs) > self._queue_limit:
            raise Refused(
                429,
                f"{self._queue_limit} requests wait already, and one text is written at a time; "
                "try again later",
                code="rate_limit_exceeded",
                headers={"retry-after": str(RETRY_SECONDS)},
            )
        job = Job(order)
        self._jobs.add(job)
        job.future = self._thread.submit(self._write, job, asyncio.get_running_loop())
        return job

    def cancel(self, job: Job) -> None:
        """Stop a job after its current token, or remove it from the queue."""
        job.cancelled = True
        if job.future is not None and job.future.cancel():  # it was in the queue
            job.order = None  # frees the prompts
            self._end(job)

    def stop(self) -> None:
        """Cancel all jobs; their clients get an error."""
        for job in list(self._jobs):
            job.events.put_nowait(Refused(503, "the server is being stopped"))
            self.cancel(job)

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown(wait=True)

    def _end(self, job: Job) -> None:
        self._jobs.discard(job)
        job.events.put_nowait(None)

    def _write(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        """Generate a job's text; runs in the thread."""
        try:
            with contextlib.closing(self._pieces(job)) as pieces:
                for piece in pieces:
                    if job.cancelled:
                        break
                    loop.call_soon_threadsafe(job.events.put_nowait, piece)
        except Exception as error:  # job.pieces() raises it
            loop.call_soon_threadsafe(job.events.put_nowait, error)
        finally:
            loop.call_soon_threadsafe(self._end, job)

    def _pieces(self, job: Job) -> Generator[Piece, None, None]:
        order, tokenizer, device = job.order, self._run.tokenizer, self._run.device
        assert order is not None, "a cancelled job never runs"
        prompts = [tokenizer.encode(p) if isinstance(p, str) else p for p in order.prompts]
        prompts = [prompt or [tokenizer.end_of_text_id] for prompt in prompts]
        job.n_prompt_tokens = sum(map(len, prompts))
        generator = torch.Generator(device=device)
        if order.seed is None:
            generator.seed()
        else:
            generator.manual_seed(order.seed)
        options = order.sampling | {"stop": order.stop, "num_samples": order.n}
        pieces = stream_text(self._run.model, tokenizer, prompts, generator=generator, **options)
        return cast(Generator[Piece, None, None], pieces)


@contextlib.asynccontextmanager
async def watched(writer: Writer, job: Job, receive: Callable) -> AsyncIterator[None]:
    """Cancel a job when its client disconnects, and at the end of the block."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        writer.cancel(job)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        writer.cancel(job)
