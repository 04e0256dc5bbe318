"""The server's queue of orders, and the thread that generates their texts one by one."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from starlette.requests import ClientDisconnect

from engine.processor import prepare_processor
from exchange.saved_run import LoadedModel
from generation import Piece, Token, evaluating, stream_text, tokens_of
from model import GPTModel
from scripts.serving.guard import Refused
from scripts.serving.protocol import Echo, Order
from text.tokenizer import encode_from_start

RETRY_SECONDS = 2
MOST_ROWS = 16  # texts that are written in one batch
MOST_SCORED = 100_000  # tokens of prompts whose log-probabilities a request may ask for
SLICE = 128  # positions whose logits are computed at once


class Job:
    """An order in the queue, and its results."""

    def __init__(self, order: Order) -> None:
        self.order: Order | None = order  # None once it is cancelled in the queue
        self.n_prompt_tokens = 0
        self.cancelled = False  # checked between two tokens
        self.future: Future[None] | None = None
        self.events: asyncio.Queue[Echo | Piece | Exception | None] = asyncio.Queue()

    async def parts(self) -> AsyncIterator[Echo | Piece]:
        """The parts of the texts as they come; raises the thread's error, or ClientDisconnect."""
        while (event := await self.events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
        if self.cancelled:
            raise ClientDisconnect


class Writer:
    """Generates the texts of orders in a thread, one by one; a limited number may wait."""

    def __init__(self, run: LoadedModel, queue_limit: int) -> None:
        self._run, self._queue_limit = run, queue_limit
        self._jobs: set[Job] = set()
        # prepare_processor() sets the handling of denormal numbers for its own thread only
        self._thread = ThreadPoolExecutor(1, "generation", initializer=prepare_processor)

    def check_room(self) -> None:
        """Raise Refused, with 429, if too many orders are waiting."""
        if len(self._jobs) > self._queue_limit:
            raise Refused(
                429,
                f"{self._queue_limit} requests wait already, and one text is written at a time; "
                "try again later",
                code="rate_limit_exceeded",
                headers={"retry-after": str(RETRY_SECONDS)},
            )

    def submit(self, order: Order) -> Job:
        """Queue an order; raises as check_room() does."""
        self.check_room()
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
            with contextlib.closing(self._parts(job)) as parts:
                for part in parts:
                    if job.cancelled:
                        break
                    loop.call_soon_threadsafe(job.events.put_nowait, part)
        except Exception as error:  # job.parts() raises it
            loop.call_soon_threadsafe(job.events.put_nowait, error)
        finally:
            loop.call_soon_threadsafe(self._end, job)

    def _parts(self, job: Job) -> Generator[Echo | Piece, None, None]:
        order, tokenizer, device = job.order, self._run.tokenizer, self._run.device
        assert order is not None, "a cancelled job never runs"
        prompts = [
            encode_from_start(tokenizer, p) if isinstance(p, str) else p for p in order.prompts
        ]
        prompts = [prompt or [tokenizer.end_of_text_id] for prompt in prompts]
        job.n_prompt_tokens = sum(map(len, prompts))
        is_scored = order.echo and order.logprobs is not None
        if is_scored:
            check_scored(prompts, self._run.model.config.context_length)
        generator = torch.Generator(device=device)
        if order.seed is None:
            generator.seed()
        else:
            generator.manual_seed(order.seed)
        options = order.sampling | order.penalties | {"stop": order.stop, "num_samples": order.n}
        options |= {"n_likeliest": order.logprobs or 0, "generator": generator}
        options |= {"stop_ids": order.stop_ids}
        is_empty = order.sampling["max_new_tokens"] == 0
        n_at_once = MOST_ROWS // order.n
        for first in range(0, len(prompts), n_at_once):
            batch, row = prompts[first : first + n_at_once], first * order.n
            if order.echo or is_empty:
                for i, ids in enumerate(batch, first):
                    yield from self._echoes(order, i, ids, is_scored)
            if not is_empty:
                for piece in stream_text(self._run.model, tokenizer, batch, **options):
                    yield dataclasses.replace(piece, row=row + piece.row) if row else piece

    def _echoes(
        self, order: Order, i: int, ids: list[int], is_scored: bool
    ) -> Generator[Echo, None, None]:
        """The i-th prompt, as each of its texts begins with it."""
        prompt, tokenizer = order.prompts[i], self._run.tokenizer
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        tokens: list[Token | None] = [None] if is_scored else []
        if is_scored:
            tokens += score(self._run.model, ids, order.logprobs or 0)
        n_hidden = len(tokenizer.begin_ids) if isinstance(prompt, str) else 0  # not of the text
        finish = "length" if order.sampling["max_new_tokens"] == 0 else None
        for row in range(i * order.n, (i + 1) * order.n):
            known = [*zip(ids, tokens, strict=True)][n_hidden:] if is_scored else []
            yield Echo(row, text if order.echo else "", known, finish)


def check_scored(prompts: Sequence[Sequence[int]], limit: int) -> None:
    """Raise Refused, with 400, if prompts are too long for their tokens' log-probabilities."""
    longest, total = max(map(len, prompts)), sum(map(len, prompts))
    if longest > limit:
        said = f"a prompt has {longest} tokens, and the model's context {limit}; logprobs with echo"
        raise Refused(400, f"{said} need all of it: shorten the prompt", param="prompt")
    if total > MOST_SCORED:
        said = f"the prompts have {total} tokens; with echo and logprobs {MOST_SCORED} are the most"
        raise Refused(400, f"{said}: send fewer at once", param="prompt")


@torch.no_grad()
def score(model: GPTModel, ids: Sequence[int], n_likeliest: int) -> list[Token]:
    """The tokens of a text but the first, each with its log-probability after those before it."""
    chosen = torch.tensor(ids, device=model.token_embedding.weight.device)
    tokens: list[Token] = []
    with evaluating(model):
        hidden = model.hidden(chosen[None])[0, :-1]  # (T - 1, C)
        # in slices: all logits of a long text take hundreds of MB
        for part, after in zip(hidden.split(SLICE), chosen[1:].split(SLICE), strict=True):
            tokens += tokens_of(model.head(part).float(), after[:, None], n_likeliest)
    return tokens


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
