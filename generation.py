"""From a model to text: a prompt in, one token after the other out.

generate() and stream() take and give token ids, stream_text() text. All of them keep the keys and
values of what was read, so that a token costs a step of one position. Where a text outgrows the
model's context its newest half is read once more, which then serves for the other half.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import nn

from engine.compiling import RecordedStep, is_compiled, not_compiled
from engine.errors import NumericsError, SettingsError
from engine.settings import check, find_problems, raise_if_any, setting, unknown_name
from engine.weights import OneRowProducts
from model import KVCache
from text.tokenizer import Tokenizer

# top_p looks at so many likeliest tokens first: sorting 50,000 logits costs milliseconds
NUCLEUS = 1024


@dataclass(frozen=True)
class SamplingConfig:
    """How many tokens are drawn, and how. Raises SettingsError with every wrong value."""

    max_new_tokens: int = setting(50, minimum=1, maximum=100_000)
    temperature: float = setting(0.8, minimum=0, maximum=1e9)
    top_k: int | None = setting(50, minimum=1)
    top_p: float | None = setting(0.9, minimum=0, maximum=1)
    min_p: float = setting(0.0, minimum=0, maximum=1)
    repetition_penalty: float = setting(1.0, minimum=0.01, maximum=100)
    repetition_window: int = setting(64, minimum=1, maximum=100_000)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Token:
    """A token that was drawn, and the logarithm of the probability that the model gave it."""

    id: int
    logprob: float  # natural; before penalty, temperature and filters


@dataclass(frozen=True)
class Piece:
    """What a step adds to one of several texts: its token, and the characters that are whole."""

    row: int
    text: str  # empty while a character or a stop string may still be incomplete
    token: Token
    finish: str | None = None  # "stop" or "length" in a row's last piece


def generate(
    model: nn.Module,
    ids: torch.Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    end_of_text_id: int | None = None,
    **options: float | torch.Generator | None,
) -> torch.Tensor | list[list[int]]:
    """Continue token ids, (B, T) or B lists, by max_new_tokens each; options as in stream().

    Returns the ids with what was added: for a tensor (B * num_samples, T + n), where rows that
    came to end_of_text_id are filled up with it; for lists as many lists. Samples of one prompt
    stand side by side.
    """
    if isinstance(ids, torch.Tensor) and ids.dim() != 2:
        raise SettingsError(f"ids has shape {tuple(ids.shape)}; generate() needs (B, T)")
    if len(ids) == 0:
        raise SettingsError("ids has no prompt; generate() needs one or more")
    prompts = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    rows = [list(prompt) for prompt in prompts for _ in range(num_samples)]
    if max_new_tokens != 0:
        options |= {"num_samples": num_samples, "end_of_text_id": end_of_text_id}
        with evaluating(model):  # once: each step would else turn a model in training to and fro
            for tokens in stream(model, prompts, max_new_tokens=max_new_tokens, **options):
                for row, token in zip(rows, tokens, strict=True):
                    if token is not None:
                        row.append(token.id)
    if not isinstance(ids, torch.Tensor):
        return rows
    longest = max(map(len, rows))
    rows = [row + [end_of_text_id] * (longest - len(row)) for row in rows]
    return torch.tensor(rows, dtype=ids.dtype, device=ids.device)


@torch.no_grad()
def generate_text_simple(
    model: nn.Module, idx: torch.Tensor, max_new_tokens: int, context_size: int
) -> torch.Tensor:
    """Continue (B, T) ids greedily, plainly: each token from the newest context_size ones anew.

    For any module that turns ids into (B, T, V) logits; generate() is much faster.
    """
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
    generator: torch.Generator | None = None,
) -> Iterator[list[Token | None]]:
    """Yield the next token of every row as it is drawn, None for a row that has ended.

    Rows are the prompts, lists of token ids, each num_samples times. A row ends with
    end_of_text_id, or after max_new_tokens. What shapes a draw is told in choose_next(); the
    penalty is for the newest repetition_window tokens of a row. The generator, on the model's
    device, makes draws repeatable. Raises SettingsError, at the first step, with every value that
    makes no sense.
    """
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "repetition_window": repetition_window,
    }
    rows = Rows(model, prompts, given, num_samples, generator)
    for _ in range(max_new_tokens):
        tokens = rows.draw()
        yield tokens
        for row, token in enumerate(tokens):
            if token is not None and token.id == end_of_text_id:
                rows.end(row)
        if not rows.running:
            return


def stream_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    stop: str | Sequence[str] = (),
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    **sampling: float | None,
) -> Iterator[Piece]:
    """Continue texts, each num_samples times; yield what is new of each as it is drawn.

    A prompt may also be token ids. sampling has the fields of SamplingConfig; those that are not
    given have its defaults. A text ends before the first stop string, at the tokenizer's end of
    text, or after max_new_tokens. An empty prompt begins as a document does: behind an end of
    text. Raises SettingsError, at the first piece.
    """
    given = asdict(SamplingConfig()) | sampling
    # a text is a sequence of texts, too: of its characters
    prompts = [prompts] if isinstance(prompts, str) else prompts
    stop = [stop] if isinstance(stop, str) else stop
    ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]
    ids = [prompt or [tokenizer.end_of_text_id] for prompt in ids]
    rows = Rows(model, ids, given, num_samples, generator)
    decoders = [tokenizer.decoder() for _ in rows.running]
    held = [_HeldBack(stop) for _ in rows.running]
    for n_drawn in range(1, given["max_new_tokens"] + 1):
        for row, token in enumerate(rows.draw()):
            if token is None:
                continue
            is_end = token.id == tokenizer.end_of_text_id
            is_last = n_drawn == given["max_new_tokens"]
            text = "" if is_end else decoders[row].add(token.id)
            if is_end or is_last:
                text += decoders[row].finish()
            text, stopped = held[row].add(text)
            finish = "stop" if is_end or stopped else "length" if is_last else None
            if finish is not None:
                text += held[row].rest()
                rows.end(row)
            yield Piece(row, text, token, finish)
        if not rows.running:
            return


class _HeldBack:
    """Lets text through up to the first stop string, and no part of one before it is known."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop string has come."""
        text = self._held + text
        # the one that is complete first, so that it does not matter how tokens cut the text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        longest = max(map(len, self._stops), default=1)
        starts = range(max(0, len(text) - longest + 1), len(text))
        cut = next(
            (i for i in starts if any(stop.startswith(text[i:]) for stop in self._stops)), len(text)
        )
        self._held = text[cut:]
        return text[:cut], False

    def rest(self) -> str:
        """What was held back and has not become a stop string."""
        rest, self._held = self._held, ""
        return rest


class Rows:
    """The texts of a batch and the model's cache of them; draws a token for each at a time."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        sampling: dict[str, float | None],
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        names = [field.name for field in fields(SamplingConfig)]
        known = {name: value for name, value in sampling.items() if name in names}
        problems = [unknown_name(name, name, names) for name in sampling.keys() - known.keys()]
        problems += find_problems(SamplingConfig, known)
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
        self._n_recent = self._choice.pop("repetition_window")
        self._limit = model.config.context_length
        n_kept = max(self._limit + 1, self._n_recent)  # nothing older is looked at
        self._texts = [list(prompt[-n_kept:]) for prompt in prompts]
        self._seen_from = [0] * len(prompts)  # where the model's window of each text begins
        self._capacity = min(self._limit, max(map(len, prompts)) + n_new)
        self._cache: KVCache | None = None
        self._recorded: RecordedStep | None = None
        self.running = set(range(len(prompts) * num_samples))

    def end(self, row: int) -> None:
        """Draw no more for a row."""
        self.running.discard(row)

    @torch.no_grad()
    def draw(self) -> list[Token | None]:
        """The next token of each row, None for those that have ended."""
        with evaluating(self._model):  # for the step alone: between two, the caller may train
            logits = self._next_logits().float()  # (rows, V)
        chosen = choose_next(
            logits, recent=self._recent(logits), generator=self._generator, **self._choice
        )
        logprobs = logits.gather(1, chosen) - logits.logsumexp(1, keepdim=True)
        drawn = list(zip(chosen[:, 0].tolist(), logprobs[:, 0].tolist(), strict=True))
        for text, (token, _) in zip(self._texts, drawn, strict=True):
            text.append(token)
        return [Token(*token) if row in self.running else None for row, token in enumerate(drawn)]

    def _next_logits(self) -> torch.Tensor:
        """(rows, V) logits of what comes next."""
        lengths = [len(t) - first for t, first in zip(self._texts, self._seen_from, strict=True)]
        if self._cache is not None and max(lengths) <= self._limit:
            return self._read([text[-1:] for text in self._texts])
        for row, length in enumerate(lengths):
            if length > self._limit:
                # nobody reads on in a text that has ended
                kept = max(1, self._limit // 2) if row in self.running else 1
                self._seen_from[row] = len(self._texts[row]) - kept
        windows = [t[first:] for t, first in zip(self._texts, self._seen_from, strict=True)]
        device = self._model.token_embedding.weight.device
        # recorded with autocast, a step would hold casts of the weights that are dropped after it
        fixed = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
        # fixed ones in few sizes: compiled code is for one each
        capacity = min(self._limit, -(-self._capacity // 256) * 256) if fixed else self._capacity
        self._cache = KVCache([len(w) for w in windows], capacity, device, fixed=fixed)
        self._recorded = None
        logits = self._read(windows)
        if self._copies > 1:
            self._cache.repeat(self._copies)
            logits = logits.repeat_interleave(self._copies, dim=0)
            self._texts = [list(text) for text in self._texts for _ in range(self._copies)]
            self._seen_from = [n for n in self._seen_from for _ in range(self._copies)]
            self._copies = 1
        return logits

    def _read(self, windows: list[list[int]]) -> torch.Tensor:
        """(rows, V) logits after the newest tokens of each row, shorter ones padded in front."""
        longest = max(map(len, windows))
        padded = [[0] * (longest - len(window)) + window for window in windows]
        ids = torch.tensor(padded, device=self._cache.device)
        if self._cache.fixed and self._cache.filled > 0:
            return self._replay(ids)
        newest = self._cache.advance(longest)
        is_one_row = ids.numel() == 1 and ids.device.type == "cpu"
        with OneRowProducts() if is_one_row else contextlib.nullcontext():
            return self._model.head(self._model.hidden(ids, newest)[:, -1])

    def _replay(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits after the next column of a fixed cache, (rows, 1) ids, by a recorded step."""
        columns = self._cache.advance(1).columns
        if self._recorded is None:
            cache = self._cache
            self._recorded = RecordedStep(
                lambda ids, columns: self._model.decode(ids, cache, columns), ids, columns
            )
        return self._recorded(ids, columns)

    def _recent(self, logits: torch.Tensor) -> torch.Tensor | None:
        """(rows, n) newest tokens of each text, for the penalty; None where there is none."""
        if self._choice["repetition_penalty"] == 1:
            return None
        newest = [text[-self._n_recent :] for text in self._texts]
        longest = max(map(len, newest))
        # a token counts once, so a shorter text may repeat its last
        newest = [tokens + tokens[-1:] * (longest - len(tokens)) for tokens in newest]
        return torch.tensor(newest, device=logits.device)


def choose_next(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    recent: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw one token a row from (B, V) logits; returns (B, 1).

    First the logits of tokens in recent, (B, n), are divided by repetition_penalty where positive
    and multiplied where negative (Keskar et al. 2019). Then, all of the distribution at this
    temperature: top_k keeps the k likeliest tokens, all where k is above V; of those, top_p keeps
    the smallest set of likeliest ones whose probabilities sum to at least p, never fewer than one
    (nucleus sampling, Holtzman et al. 2019), and min_p those that have at least that share of the
    likeliest one's probability (Nguyen et al. 2024). Temperature 0 takes the likeliest token.
    Raises NumericsError where there is no likeliest one.
    """
    if recent is not None and repetition_penalty != 1:
        seen = logits.gather(1, recent)
        seen = torch.where(seen > 0, seen / repetition_penalty, seen * repetition_penalty)
        logits = logits.scatter(1, recent, seen)
    highest = logits.amax(dim=-1, keepdim=True)
    if not highest.isfinite().all():
        raise NumericsError("the model's logits are not finite: there is no token to choose")
    if temperature < torch.finfo(torch.float32).tiny or top_k == 1:  # fp32 may divide by it as 0
        return logits.argmax(dim=-1, keepdim=True)
    # the highest logit becomes 0 before the division, so that no temperature overflows
    logits, tokens = (logits - highest) / min(temperature, torch.finfo(torch.float32).max), None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k, dim=-1)  # both (B, k), likeliest first
    if top_p is not None and top_p < 1:
        total = logits.logsumexp(dim=-1, keepdim=True)
        if tokens is None:
            logits, tokens = _likeliest(logits, total, top_p)
        probabilities = (logits - total).exp()
        before = probabilities.cumsum(dim=-1) - probabilities  # what likelier tokens sum to
        before[:, 0] = -1.0  # the likeliest token stays even at top_p 0
        logits = logits.masked_fill(before >= top_p, -math.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < math.log(min_p), -math.inf)
    drawn = _draw(logits, generator)
    return drawn if tokens is None else tokens.gather(-1, drawn)


def _draw(logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """(B, 1) indices drawn from (B, n) logits, one random number a row.

    torch.multinomial takes one for each token, which for 50,000 of them is a millisecond.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # Metal has no fp64
    cumulative = logits.to(wide).softmax(dim=-1).cumsum(dim=-1)
    point = (
        torch.rand((len(logits), 1), dtype=wide, device=logits.device, generator=generator)
        * cumulative[:, -1:]
    )
    # below the sum, whatever rounding does: at the end there may be tokens of no probability
    return torch.searchsorted(cumulative, point * (1 - torch.finfo(wide).eps), right=True)


def _likeliest(
    logits: torch.Tensor, total: torch.Tensor, top_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest logits in order, and their tokens: enough of them for a probability of top_p."""
    first = logits.topk(min(NUCLEUS, logits.shape[-1]), dim=-1)
    if ((first.values.logsumexp(dim=-1, keepdim=True) - total).exp() >= top_p).all():
        return first.values, first.indices
    ordered = logits.sort(dim=-1, descending=True)
    return ordered.values, ordered.indices


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, uncompiled, and leave it in the mode it had."""
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with not_compiled() if is_compiled(model) else contextlib.nullcontext():
            yield
    finally:
        if was_training:
            model.train()


def text_to_token_ids(text: str, tokenizer: Tokenizer) -> torch.Tensor:
    """The token ids of a text as a batch of one, (1, T); SettingsError for an empty text."""
    ids = tokenizer.encode(text)
    if not ids:
        raise SettingsError("the text to go on from is empty; give the model a word to start with")
    return torch.tensor([ids], dtype=torch.long)


def token_ids_to_text(ids: torch.Tensor, tokenizer: Tokenizer) -> str:
    """The text of (T,) or (1, T) token ids; incomplete characters become U+FFFD."""
    return tokenizer.decode(ids.flatten().tolist())
