"""Autoregressive generation with a KV cache: of token ids or of text, at once or as a stream.

When a text outgrows the model's context, its newest half is computed again into a new cache,
which has room for as many new tokens.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from engine.compiling import (
    RecordedStep,
    free_steps,
    is_compiled,
    keep_step,
    not_compiled,
    take_step,
    weight_addresses,
)
from engine.devices import steady_attention
from engine.errors import NumericsError, SettingsError, is_out_of_memory
from engine.metrics import TokenSize
from engine.settings import check, find_problems, raise_if_any, setting, unknown_name
from engine.weights import OneRowProducts
from model import KVCache
from text.tokenizer import Tokenizer, encode_from_start

# the likeliest tokens that top_p tries first: a CPU sorts 50,000 logits for milliseconds
NUCLEUS = 1024
# characters of a sample whose max_new_tokens is None; and the most tokens of any
SAMPLE_CHARACTERS, LONGEST_SAMPLE = 300, 100_000
NOT_FINITE = "the model's logits are not finite: there is no token to choose"


@dataclass(frozen=True)
class SamplingConfig:
    """How many tokens are sampled, and how. Raises SettingsError with every wrong value."""

    # None: as many as make some SAMPLE_CHARACTERS, which fitted() computes
    max_new_tokens: int | None = setting(None, minimum=1, maximum=LONGEST_SAMPLE)
    temperature: float = setting(0.8, minimum=0, maximum=1e9)
    top_k: int | None = setting(50, minimum=1)
    top_p: float | None = setting(0.9, minimum=0, maximum=1)
    min_p: float = setting(0.0, minimum=0, maximum=1)
    repetition_penalty: float = setting(1.0, minimum=0.01, maximum=100)
    repetition_window: int = setting(64, minimum=1, maximum=100_000)

    def __post_init__(self) -> None:
        check(self)

    def fitted(self, size: TokenSize) -> "SamplingConfig":
        """With a number of tokens, given the mean length of a token of the text."""
        if self.max_new_tokens is not None:
            return self
        count = min(LONGEST_SAMPLE, max(1, round(SAMPLE_CHARACTERS / size.characters)))
        return replace(self, max_new_tokens=count)


def find_sampling_problems(
    values: Mapping[str, Any], label: Callable[[str], str] = str
) -> list[str]:
    """find_problems() of SamplingConfig's fields for a generation, which needs a length."""
    problems = find_problems(SamplingConfig, values, label)
    if values.get("max_new_tokens", 0) is None:
        name = label("max_new_tokens")
        problems.append(f"{name} is None; it must be a whole number from 1 to {LONGEST_SAMPLE:,}")
    return problems


@dataclass(frozen=True)
class Token:
    """A sampled token and the natural logarithm of its probability."""

    id: int
    logprob: float  # the model's, before penalties, temperature and filters
    likeliest: tuple[tuple[int, float], ...] = ()  # if requested: ids and logprobs, best first


@dataclass(frozen=True)
class Piece:
    """What a step adds to one text: a token and the characters that are complete."""

    row: int
    text: str  # empty while a character or a possible stop string is incomplete
    token: Token
    finish: str | None = None  # "stop" or "length" in a row's last piece


def generate(
    model: nn.Module,
    ids: torch.Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    end_of_text_id: int | None = None,
    on_step: Callable[[], object] | None = None,
    **options: Any,
) -> torch.Tensor | list[list[int]]:
    """Continue token ids, (B, T) or B lists, by max_new_tokens each; options as in stream().

    Returns prompts and continuations as B * num_samples lists, or for a tensor as one of shape
    (B * num_samples, T + n), padded with end_of_text_id. Samples of one prompt are adjacent.
    on_step is called after each token of all rows; what it raises ends the call. Raises
    SettingsError as stream() does, and for a tensor with stop_ids and nothing to pad it with.
    """
    if isinstance(ids, torch.Tensor) and options.get("stop_ids") and end_of_text_id is None:
        raise SettingsError(
            "rows of a tensor that end at stop_ids are padded with end_of_text_id, which is not "
            "set; set it, or give lists of ids"
        )
    if isinstance(ids, torch.Tensor) and ids.dim() != 2:
        raise SettingsError(f"ids has shape {tuple(ids.shape)}; generate() needs (B, T)")
    if len(ids) == 0:
        raise SettingsError("ids has no prompt; generate() needs one or more")
    prompts = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    rows = [list(prompt) for prompt in prompts for _ in range(num_samples)]
    if max_new_tokens != 0:
        options |= {"num_samples": num_samples, "end_of_text_id": end_of_text_id}
        with evaluating(model):  # else each step would switch the model's mode twice
            for tokens in stream(model, prompts, max_new_tokens=max_new_tokens, **options):
                for row, token in zip(rows, tokens, strict=True):
                    if token is not None:
                        row.append(token.id)
                if on_step is not None:
                    on_step()
    if not isinstance(ids, torch.Tensor):
        return rows
    longest = max(map(len, rows))
    rows = [row + [end_of_text_id] * (longest - len(row)) for row in rows]
    return torch.tensor(rows, dtype=ids.dtype, device=ids.device)


@torch.no_grad()
def generate_text_simple(
    model: nn.Module, idx: torch.Tensor, max_new_tokens: int, context_size: int
) -> torch.Tensor:
    """Continue (B, T) ids greedily with any module of ids -> (B, T, V) logits; it has no cache."""
    with evaluating(model):
        for _ in range(max_new_tokens):
            logits = model(idx[:, -context_size:])[:, -1]  # (B, V)
            idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return idx


def stream(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    repetition_window: int = 64,
    num_samples: int = 1,
    end_of_text_id: int | None = None,
    stop_ids: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[list[Token | None]]:
    """Yield the next token of every row at each step, None for a row that has ended.

    Rows are the prompts, lists of token ids, each num_samples times. A row ends with end_of_text_id
    or one of stop_ids. choose_next() explains the options; the penalty applies to the newest
    repetition_window tokens of a row. The generator is on the model's device. Raises SettingsError
    with every wrong value, at the first step.
    """
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "repetition_window": repetition_window,
    }
    ends = {end_of_text_id, *stop_ids}
    with contextlib.closing(Rows(model, prompts, sampling, num_samples, generator)) as rows:
        for _ in range(max_new_tokens):
            tokens = rows.draw()
            yield tokens
            for row, token in enumerate(tokens):
                if token is not None and token.id in ends:
                    rows.running.discard(row)
            if not rows.running:
                return


def stream_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    stop: str | Sequence[str] = (),
    stop_ids: Collection[int] = (),
    num_samples: int = 1,
    n_likeliest: int = 0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    generator: torch.Generator | None = None,
    **sampling: Any,
) -> Iterator[Piece]:
    """Continue texts, each num_samples times; yield what each step adds to each text.

    A text begins as a document does, with the token that the tokenizer puts there, if any. A prompt
    may also be token ids, as they are; an empty one becomes an end of text. sampling overrides the
    fields of SamplingConfig(), and has max_new_tokens; choose_next() explains the penalties. A
    token has the n_likeliest tokens that could have been drawn. A text ends before the first stop
    string, at an end of text or one of stop_ids (an end of turn), or after max_new_tokens. Raises
    SettingsError at the first piece.
    """
    given = asdict(SamplingConfig()) | sampling
    # a str is a sequence of str too
    prompts = [prompts] if isinstance(prompts, str) else prompts
    stop = [stop] if isinstance(stop, str) else stop
    ids = [encode_from_start(tokenizer, p) if isinstance(p, str) else p for p in prompts]
    ids = [prompt or [tokenizer.end_of_text_id] for prompt in ids]
    rows = Rows(
        model,
        ids,
        given,
        num_samples,
        generator,
        n_likeliest=n_likeliest,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
    )
    ends = {tokenizer.end_of_text_id, *stop_ids}
    with contextlib.closing(rows):
        decoders = [tokenizer.decoder(prompt) for prompt in ids for _ in range(num_samples)]
        held = [_HeldBack(stop) for _ in rows.running]
        for n_drawn in range(1, given["max_new_tokens"] + 1):
            is_last = n_drawn == given["max_new_tokens"]
            for row, token in enumerate(rows.draw()):
                if token is None:
                    continue
                is_end = token.id in ends
                text = "" if is_end else decoders[row].add(token.id)
                if is_end or is_last:
                    text += decoders[row].finish()
                text, stopped = held[row].add(text)
                finish = "stop" if is_end or stopped else "length" if is_last else None
                if finish is not None:
                    text += held[row].rest
                    rows.running.discard(row)
                yield Piece(row, text, token, finish)
            if not rows.running:
                return


class _HeldBack:
    """Passes text on up to the first stop string; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self.rest = ""  # what is held back

    def add(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string is complete."""
        text, self.rest = self.rest + text, ""
        # the one that ends first, however the text is divided into tokens
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)[1]], True
        longest = max(map(len, self._stops), default=1)
        for cut in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[cut:]) for stop in self._stops):
                self.rest = text[cut:]
                return text[:cut], False
        return text, False


class Rows:
    """The texts of a batch with the model's KV cache; each draw() adds a token to each."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: dict[str, Any],
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        *,
        n_likeliest: int = 0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
    ) -> None:
        names = [field.name for field in fields(SamplingConfig)]
        known = {name: value for name, value in sampling.items() if name in names}
        problems = [unknown_name(name, name, names) for name in sampling.keys() - known.keys()]
        problems += find_sampling_problems(known)
        vocab_size = model.config.vocab_size
        if len(prompts) == 0 or not all(len(prompt) for prompt in prompts):
            problems.append("ids has a prompt without a token; each must have one or more")
        elif not all(min(prompt) >= 0 and max(prompt) < vocab_size for prompt in prompts):
            problems.append(f"ids has a token that is not in 0 to {vocab_size - 1}")
        if not isinstance(num_samples, int) or num_samples < 1:
            problems.append(f"num_samples is {num_samples}; it must be a whole number from 1")
        raise_if_any(problems, "generation")
        self._model, self._generator, self._copies = model, generator, num_samples
        self._choice = dict(sampling)
        n_new = self._choice.pop("max_new_tokens")
        window = self._choice.pop("repetition_window")
        self._n_recent = 0 if self._choice["repetition_penalty"] == 1 else window
        self._choice |= {"frequency_penalty": frequency_penalty}
        self._choice |= {"presence_penalty": presence_penalty}
        self._n_likeliest = min(n_likeliest, vocab_size)
        self._n_drawn = 0
        self._limit = model.config.context_length
        n_kept = max(self._limit + 1, window)  # older tokens have no effect
        self._texts = [list(prompt[-n_kept:]) for prompt in prompts]
        self._seen_from = [0] * len(prompts)  # where the cached window of each text starts
        self._n_total = max(map(len, prompts)) + n_new
        self._batch: _Batch | None = None
        self._kept_as: tuple[tuple, tuple] | None = None  # the model keeps a recorded batch so
        self._held: list[torch.Tensor] = []  # the weights that a recorded batch reads
        self.running = set(range(len(prompts) * num_samples))  # the caller discards ended rows

    @torch.no_grad()
    def draw(self) -> list[Token | None]:
        """The next token of each row, None for a row that has ended."""
        with evaluating(self._model):  # only during the step: between steps the caller may train
            drawn = self._next().cpu()  # the one time that the host waits for the device
        tokens = _unpack(drawn)
        if any(token.id < 0 for token in tokens):
            raise NumericsError(NOT_FINITE)
        self._n_drawn += 1
        for text, token in zip(self._texts, tokens, strict=True):
            text.append(token.id)
        return [token if row in self.running else None for row, token in enumerate(tokens)]

    def close(self) -> None:
        """Leave a recorded step and its memory to the next request; call it after the last draw."""
        if self._batch is not None and self._kept_as is not None:
            keep_step(self._model, *self._kept_as, self._batch)
        self._batch, self._kept_as, self._held = None, None, []

    def _next(self) -> torch.Tensor:
        """Each row's next token and logprob, as a _Batch gives them."""
        try:
            if self._batch is not None and max(self._lengths()) <= self._limit:
                drawn = self._batch.step(self._model, self._generator)
                # compared while the device computes; what it reads is held
                if self._kept_as is None or self._kept_as[0] == weight_addresses(self._model):
                    return drawn
            return self._begin()
        except (MemoryError, RuntimeError) as error:
            if not (is_out_of_memory(error) and free_steps(self._model)):
                raise
        return self._begin()  # with the memory of kept steps

    def _lengths(self) -> list[int]:
        return [len(t) - first for t, first in zip(self._texts, self._seen_from, strict=True)]

    def _begin(self) -> torch.Tensor:
        """Read each text, or the newest half of one that is too long; returns as _next() does."""
        self.close()
        for row, length in enumerate(self._lengths()):
            if length > self._limit:  # a text that has ended needs no context
                kept = max(1, self._limit // 2) if row in self.running else 1
                self._seen_from[row] = len(self._texts[row]) - kept
        windows = [t[first:] for t, first in zip(self._texts, self._seen_from, strict=True)]
        device = self._model.token_embedding.weight.device
        # a graph recorded under autocast would read casts of the weights that are freed
        recorded = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        # few sizes of recorded steps
        size = -(-self._n_total // 256) * 256 if recorded else self._n_total
        capacity, longest = min(self._limit, size), max(map(len, windows))
        cache = KVCache(list(map(len, windows)), longest if recorded else capacity, device)
        padded = [[0] * (longest - len(window)) + window for window in windows]
        ids = torch.tensor(padded, device=device)  # (B, longest)
        with _kernels_for(self._model, ids):
            logits = self._model.head(self._model.hidden(ids, cache.advance(longest))[:, -1])
        if self._copies > 1:
            cache.repeat(self._copies)
            logits = logits.repeat_interleave(self._copies, dim=0)
            self._texts = [list(text) for text in self._texts for _ in range(self._copies)]
            self._seen_from = [n for n in self._seen_from for _ in range(self._copies)]
            self._copies = 1
        recent = _newest(self._texts, min(self._n_recent, size), device)
        counts = self._counts(device)
        if recorded:
            shape = (*recent.shape, capacity, cache.starts is not None, self._n_likeliest)
            self._batch = self._recorded_batch(shape, device)
        else:
            self._batch = _Batch(cache, len(recent), self._choice, self._n_likeliest)
        return self._batch.begin(cache, logits.float(), (recent, *counts), self._generator)

    def _counts(self, device: torch.device) -> list[torch.Tensor]:
        """How often each row has drawn each token, (rows, V), if a penalty needs it."""
        if not self._choice["frequency_penalty"] and not self._choice["presence_penalty"]:
            return []
        drawn = torch.tensor([t[len(t) - self._n_drawn :] for t in self._texts], dtype=torch.long)
        counts = torch.zeros(len(drawn), self._model.config.vocab_size)
        counts.scatter_add_(1, drawn, torch.ones(drawn.shape))
        return [counts.to(device)]

    def _recorded_batch(self, shape: tuple, device: torch.device) -> "_Batch":
        """An earlier request's batch, whose recorded step serves this one too, or a new one.

        shape is (rows, recent tokens of each, cache's capacity, whether rows are padded, the
        likeliest tokens that are told).
        """
        # tensors made in inference mode can't be written outside it
        key = (*shape, torch.is_inference_mode_enabled(), *self._choice.values())
        self._kept_as = weight_addresses(self._model), key
        self._held = [t.detach() for t in (*self._model.parameters(), *self._model.buffers())]
        n_rows, _, capacity, _, n_likeliest = shape
        fixed = KVCache([0] * n_rows, capacity, device, fixed=True)
        kept = take_step(self._model, *self._kept_as)
        return kept or _Batch(fixed, n_rows, self._choice, n_likeliest)


class _Batch:
    """Rows that are continued together: all that a decoding step reads and changes on the device.

    The step of a fixed cache is recorded. What is drawn comes in one tensor of _pack(), so that the
    host reads once; a token is -1 where the highest logit is not finite.
    """

    def __init__(
        self, cache: KVCache, n_rows: int, choice: dict[str, Any], n_likeliest: int = 0
    ) -> None:
        self._cache, self._choice, self._n_likeliest = cache, choice, n_likeliest
        self._points = _new_points(n_rows, cache.device)
        self._state: tuple[torch.Tensor, ...] = ()  # each row's newest token, recent ones, counts
        self._recorded: RecordedStep | None = None  # of a fixed cache; it keeps the state

    def begin(
        self,
        cache: KVCache,
        logits: torch.Tensor,
        seen: tuple[torch.Tensor, ...],
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """Draw from (rows, V) logits; cache has the tokens before, seen is _newest()'s and
        _counts()'s."""
        self._fill_points(generator)
        drawn, self._state = self._draw(logits, *seen)
        if self._cache.fixed:
            state = (*self._state, torch.full((1,), cache.filled, device=cache.device))
            self._cache.take_over(cache)
            self._recorded = self._recorded or RecordedStep(*state)
            self._recorded.restart(*state)
        return drawn

    def step(self, model: nn.Module, generator: torch.Generator | None) -> torch.Tensor:
        """Draw what follows the newest tokens."""
        self._fill_points(generator)
        if self._recorded is not None:
            return self._recorded(functools.partial(self._advance, model))
        drawn, self._state = self._advance(model, *self._state)
        return drawn

    def _fill_points(self, generator: torch.Generator | None) -> None:
        # not in the graph, so that it serves every generator
        if not _is_greedy(self._choice["temperature"], self._choice["top_k"]):
            self._points.uniform_(generator=generator)

    def _advance(
        self, model: nn.Module, ids: torch.Tensor, *seen: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A step and the next state, of which a fixed cache's ends with the newest column, (1,)."""
        columns = seen[-1:] if self._cache.fixed else ()
        seen = seen[:-1] if self._cache.fixed else seen
        with _kernels_for(model, ids):
            if columns:
                logits = model.decode(ids, self._cache, *columns)
            else:
                logits = model.head(model.hidden(ids, self._cache.advance(1))[:, -1])
        drawn, state = self._draw(logits.float(), *seen)
        return drawn, (*state, *(column + 1 for column in columns))

    def _draw(
        self, logits: torch.Tensor, recent: torch.Tensor, *counts: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """What is drawn, and the newest and the recent tokens and the counts with it."""
        options = self._choice | {"recent": recent, "counts": counts[0] if counts else None}
        chosen = choose_next(logits, points=self._points, **options)
        ids = chosen.clamp(min=0)
        drawn = _pack(logits, chosen, self._n_likeliest)
        one = torch.ones_like(ids, dtype=logits.dtype)
        counts = tuple(count.scatter_add(1, ids, one) for count in counts)
        return drawn, (ids, torch.cat((recent, ids), dim=1)[:, 1:], *counts)


def _newest(texts: list[list[int]], n: int, device: torch.device) -> torch.Tensor:
    """(rows, n) newest tokens of each text; a shorter one repeats its first, which counts once."""
    newest = [text[max(0, len(text) - n) :] for text in texts]
    padded = [tokens[:1] * (n - len(tokens)) + tokens for tokens in newest]
    return torch.tensor(padded, dtype=torch.long, device=device)


def _kernels_for(model: nn.Module, ids: torch.Tensor) -> contextlib.AbstractContextManager:
    """The context of the kernels that suit generation from (B, T) ids."""
    is_one_row = ids.numel() == 1 and ids.device.type == "cpu"
    if is_one_row and getattr(model, "decodes_by_onednn", False):
        return contextlib.nullcontext()
    return OneRowProducts() if is_one_row else steady_attention(ids.device)


def tokens_of(logits: torch.Tensor, chosen: torch.Tensor, n_likeliest: int = 0) -> list[Token]:
    """The Token of each row, from (B, V) logits, as the model gave them, and (B, 1) ids."""
    return _unpack(_pack(logits, chosen, n_likeliest).cpu())


def _pack(logits: torch.Tensor, chosen: torch.Tensor, n_likeliest: int) -> torch.Tensor:
    """Tokens and logprobs in one int32 tensor, (B, 2 + 2 n_likeliest), which holds fp32's bits.

    A row has the chosen token and its logprob, the likeliest tokens, and their logprobs.
    """
    total = logits.logsumexp(1, keepdim=True)
    logprobs = logits.gather(1, chosen.clamp(min=0)) - total
    parts = [chosen.int(), logprobs.view(torch.int32)]
    if n_likeliest > 0:
        values, ids = logits.topk(n_likeliest, dim=1)  # both (B, n_likeliest)
        parts += [ids.int(), (values - total).view(torch.int32)]
    return torch.cat(parts, dim=1)


def _unpack(packed: torch.Tensor) -> list[Token]:
    """The Token of each row of _pack()'s tensor, on the CPU."""
    rows = zip(packed.tolist(), packed.view(torch.float32).tolist(), strict=True)
    n = packed.shape[1] // 2 - 1
    return [
        Token(ids[0], numbers[1], tuple(zip(ids[2 : 2 + n], numbers[2 + n :], strict=True)))
        for ids, numbers in rows
    ]


def choose_next(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    recent: torch.Tensor | None = None,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    counts: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    points: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample one token a row from (B, V) logits; returns (B, 1).

    repetition_penalty divides the positive logits of tokens in recent, (B, n), and multiplies the
    negative ones (Keskar et al. 2019). Of counts, (B, V), how often each token was drawn, the other
    two are subtracted: frequency_penalty for each time, presence_penalty once if there was one (API
    reference of OpenAI). Of the full distribution at this temperature top_k keeps the
    k likeliest tokens; top_p the fewest likeliest ones that sum to p (nucleus sampling, Holtzman et
    al. 2019); min_p those with that share of the likeliest one's probability (Nguyen et al. 2024).
    Temperature 0 is greedy. Raises NumericsError where the highest logit is not finite.

    With points, (B, 1) numbers in [0, 1) instead of the generator's, the host does not wait for
    the device: the token is -1 where the highest logit is not finite.
    """
    if recent is not None and repetition_penalty != 1:
        seen = logits.gather(1, recent)
        seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
        logits = logits.scatter(1, recent, seen)
    if counts is not None:
        logits = logits - frequency_penalty * counts - presence_penalty * (counts > 0)
    highest = logits.amax(dim=-1, keepdim=True)
    is_finite = highest.isfinite()
    if points is None and not is_finite.all():
        raise NumericsError(NOT_FINITE)
    if _is_greedy(temperature, top_k):
        return logits.argmax(dim=-1, keepdim=True).masked_fill(~is_finite, -1)
    if points is None:
        points = _new_points(len(logits), logits.device).uniform_(generator=generator)
    # subtracts the highest logit before the division, so that no temperature overflows
    logits, tokens = (logits - highest) / min(temperature, torch.finfo(torch.float32).max), None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k, dim=-1)  # both (B, k), likeliest first
    if top_p is not None and top_p < 1:
        total = logits.logsumexp(dim=-1, keepdim=True)
        if tokens is None:
            logits, tokens = _likeliest(logits, total, top_p)
        probabilities = (logits - total).exp()
        before = probabilities.cumsum(dim=-1) - probabilities  # the sum of likelier tokens'
        before[:, 0].fill_(-1.0)  # keeps the likeliest token even with top_p 0
        logits = logits.masked_fill(before >= top_p, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    drawn = _draw(logits, points)
    chosen = drawn if tokens is None else tokens.gather(-1, drawn)
    return chosen.masked_fill(~is_finite, -1)


def _is_greedy(temperature: float, top_k: int | None) -> bool:
    return temperature < torch.finfo(torch.float32).tiny or top_k == 1  # fp32 may flush it to 0


def _new_points(n_rows: int, device: torch.device) -> torch.Tensor:
    """Room for a random number a row, (n_rows, 1)."""
    wide = torch.float32 if device.type == "mps" else torch.float64  # Metal has no fp64
    return torch.zeros(n_rows, 1, dtype=wide, device=device)


def _draw(logits: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(B, 1) indices sampled from (B, n) logits by a random number a row."""
    # torch.multinomial draws n of them, which takes a millisecond for 50,000
    wide = points.dtype
    cumulative = logits.to(wide).softmax(dim=-1).cumsum(dim=-1)
    # less than the sum, however it is rounded: the last tokens may have probability 0
    points = points * cumulative[:, -1:] * (1 - torch.finfo(wide).eps)
    drawn = torch.searchsorted(cumulative, points, right=True)
    return drawn.clamp(max=logits.shape[-1] - 1)  # n where the logits are not finite


def _likeliest(
    logits: torch.Tensor, total: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logits in order, enough for a probability of top_p, and their tokens."""
    if logits.device.type == "cpu":  # a GPU sorts fast, and the host would wait for the condition
        highest, tokens = logits.topk(min(NUCLEUS, logits.shape[-1]), dim=-1)
        if ((highest.logsumexp(dim=-1, keepdim=True) - total).exp() >= top_p).all():
            return highest, tokens
    return logits.sort(dim=-1, descending=True)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, uncompiled, and restore its mode afterwards."""
    was_training = model.training
    if was_training:  # setting a mode walks over all modules
        model.eval()
    try:
        with not_compiled() if is_compiled(model) else contextlib.nullcontext():
            yield
    finally:
        if was_training:
            model.train()


def text_to_token_ids(text: str, tokenizer: Tokenizer) -> torch.Tensor:
    """The token ids of a text, (1, T), behind the token that begins each document, if the tokenizer
    has one. Raises SettingsError for an empty text."""
    ids = encode_from_start(tokenizer, text)
    if len(ids) == len(tokenizer.begin_ids):
        raise SettingsError("the text to go on from is empty; give the model a word to start with")
    return torch.tensor([ids], dtype=torch.long)


def token_ids_to_text(ids: torch.Tensor, tokenizer: Tokenizer) -> str:
    """The text of (T,) or (1, T) token ids without the token that begins a document; an incomplete
    character becomes U+FFFD."""
    found = ids.flatten().tolist()
    n_begin = len(tokenizer.begin_ids)
    return tokenizer.decode(found[n_begin * (tuple(found[:n_begin]) == tokenizer.begin_ids) :])
