"""What writes for the server: a queue of orders and a thread that carries out one at a time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from starlette.requests import ClientDisconnect

from engine.processor import prepare_processor
from exchange.saved_run import LoadedRun
from generation import Piece, stream_text
from scripts.serving.guard import Refused
from scripts.serving.protocol import Order

RETRY_SECONDS = 2


class Job:
    """An order in the queue, and what comes out of it."""

    def __init__(self, order: Order) -> None:
        self.order: Order | None = order
        self.n_prompt_tokens = 0
        self.cancelled = False  # looked at between two tokens
        self.future: Future | None = None
        self.events: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces as they are drawn; raises what went wrong, or that the client has gone."""
        while (event := await self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
        if self.cancelled:
            raise ClientDisconnect


class Writer:
    """Carries orders out in a thread, one at a time; a limited number may wait."""

    def __init__(self, run: LoadedRun, queue_limit: int) -> None:
        self._run, self._queue_limit = run, queue_limit
        self._jobs: set[Job] = set()
        # what prepare_processor() says of small numbers holds for the thread that calls it
        self._thread = ThreadPoolExecutor(1, "generation", initializer=prepare_processor)

    def submit(self, order: Order) -> Job:
        """Queue an order; Refused, with 429, where too many wait already."""
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
        """End a job between two tokens, or before its first."""
        job.cancelled = True
        if job.future.cancel():  # it was still waiting, and its order is carried out by nobody
            job.order = None
            self._end(job)

    def stop(self) -> None:
        """End all jobs; those who wait for one are told why."""
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
        """Draw a job's text, in the thread."""
        try:
            with contextlib.closing(self._pieces(job)) as pieces:
                for piece in pieces:
                    if job.cancelled:
                        break
                    loop.call_soon_threadsafe(job.events.put_nowait, piece)
        except Exception as error:  # the one who asked gets to know
            loop.call_soon_threadsafe(job.events.put_nowait, error)
        finally:
            loop.call_soon_threadsafe(self._end, job)

    def _pieces(self, job: Job) -> Iterator[Piece]:
        order, tokenizer, device = job.order, self._run.tokenizer, self._run.device
        prompts = [tokenizer.encode(p) if isinstance(p, str) else p for p in order.prompts]
        prompts = [prompt or [tokenizer.end_of_text_id] for prompt in prompts]
        job.n_prompt_tokens = sum(map(len, prompts))
        generator = torch.Generator(device=device)
        if order.seed is None:
            generator.seed()
        else:
            generator.manual_seed(order.seed)
        return stream_text(
            self._run.model,
            tokenizer,
            prompts,
            stop=order.stop,
            num_samples=order.n,
            generator=generator,
            **order.sampling,
        )


@contextlib.asynccontextmanager
async def watched(writer: Writer, job: Job, receive: Callable) -> AsyncIterator[None]:
    """Cancel a job when its client goes, and in any case at the end."""

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
