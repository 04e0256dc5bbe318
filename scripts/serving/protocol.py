"""OpenAI's protocol: requests are checked, and answers get their shapes."""

import dataclasses
import io
import itertools
import json
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from engine.errors import PipelineError
from engine.settings import find_problems
from generation import Piece, SamplingConfig, Token
from scripts.conversation import ASSISTANT, SYSTEM, Converser, TooLongError
from scripts.serving.guard import Refused
from text.chat import content_text
from text.chat_template import Message
from text.tokenizer import ForeignTokenizer, Tokenizer

MOST_COPIES = 16  # n: texts that a request may ask for of each prompt
MOST_TEXTS = 1024  # that a request may ask for: prompts times n
MOST_LIKELIEST = 20  # tokens beside the drawn one whose log-probabilities a request may ask for
MOST_IGNORED = 100  # names of ignored parameters that are noted
LONGEST_NAME = 60  # characters of such a name
MOST_STOPS = 16
MOST_PROBLEMS = 8  # in one refusal: a hostile request may have any number
LONGEST_STOP = 1000
LENGTHS = ("max_tokens", "max_completion_tokens")
PENALTIES = ("frequency_penalty", "presence_penalty")
# parameters that an endpoint does not support, with the values that change nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({}, []),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
# parameters about accounts and storage, which are ignored
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "verbosity",
    "parallel_tool_calls",
)
ROLES = ("system", "developer", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Served:
    """The model that is served, and the defaults of a request."""

    model: str  # the name of the run
    aliases: tuple[str, ...]
    created: int  # seconds since 1970
    fingerprint: str
    tokenizer: Tokenizer
    sampling: dict[str, Any]  # all fields of SamplingConfig
    seed: int | None
    answer_limit: int  # tokens
    converser: Converser | None = None  # of a chat model
    answer_length: int | None = None  # max_new_tokens of a chat model's answer


@dataclasses.dataclass(frozen=True)
class Order:
    """A request, checked."""

    is_chat: bool
    prompts: list[str | list[int]]
    n: int
    stop: list[str]
    seed: int | None
    sampling: dict[str, Any]  # all fields of SamplingConfig; max_new_tokens may be 0
    penalties: dict[str, float]
    logprobs: int | None  # with each token, how many of the likeliest; None: not even its own
    echo: bool  # whether the texts begin with their prompts
    stream: bool
    include_usage: bool
    is_substitute: bool  # whether another model was requested
    ignored: list[str]  # parameters that nothing here knows
    messages: list[Message]  # for a chat model, in place of prompts until render_order()
    stop_ids: tuple[int, ...] = ()  # tokens that end a text beside the end of text
    n_dropped: int = 0  # messages that do not fit into the context


@dataclasses.dataclass(frozen=True)
class Echo:
    """What comes before the drawn tokens of a text: its prompt, if the request wants it back."""

    row: int
    text: str
    # its tokens, none without logprobs: nothing predicts the first token of all
    tokens: list[tuple[int, Token | None]]
    finish: str | None  # "length" if no token is to be drawn


def shown(value: Any) -> str:
    """A value as its sender wrote it, in JSON, on one line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "nested too deeply"
    text = text.encode("utf-8", "backslashreplace").decode()  # half characters
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def read_order(body: bytes, served: Served, *, is_chat: bool) -> Order:
    """Check a request's body; Refused for wrong values. Unknown parameters are ignored."""
    given = parse_object(body)
    fields = _Fields(given)
    name = given.get("model")
    if name is not None and not isinstance(name, str):
        fields.wrong("model", f"model is {shown(name)}; it must be text, as {shown(served.model)}")
    messages: list[Message] = []
    if not is_chat:
        prompts = _prompts(fields, served.tokenizer.vocab_size)
    elif served.converser is not None:
        prompts, messages = [""], _messages(fields)
    else:  # a base model has no chat template
        contents = [message.content for message in _messages(fields)]
        prompts = ["\n\n".join(content for content in contents if content)]
    up_to = f"a whole number from 1 to {MOST_COPIES}"
    n = fields.take("n", 1, _whole_number(1, MOST_COPIES), up_to)
    if len(prompts) * n > MOST_TEXTS and not fields.problems:
        rows = f"{len(prompts)} prompts with n = {n}" if n > 1 else f"{len(prompts)} prompts"
        said = f"{rows} are too many: {MOST_TEXTS} texts in a request at most; send several"
        fields.wrong("prompt", said)
    stop = _stop_strings(fields)
    seed = fields.take(
        "seed", served.seed, _whole_number(-(2**63), 2**63 - 1), "a whole number of 64 bits"
    )
    stream = fields.take("stream", False, _is_bool, "true or false")
    options = fields.take("stream_options", {}, lambda v: isinstance(v, dict), "an object")
    include_usage = options.get("include_usage") or False
    if not _is_bool(include_usage):
        fields.wrong("stream_options", "include_usage must be true or false")
    echo = not is_chat and fields.take("echo", False, _is_bool, "true or false")
    return Order(
        is_chat=is_chat,
        prompts=prompts,
        n=n,
        stop=stop,
        seed=seed,
        sampling=_sampling(fields, served, is_chat=is_chat),
        penalties={name: fields.take(name, 0, _is_penalty, "from -2 to 2") for name in PENALTIES},
        logprobs=_logprobs(fields, is_chat),
        echo=echo,
        stream=stream,
        include_usage=include_usage,
        is_substitute=name != served.model and name not in served.aliases,
        messages=messages,
        ignored=fields.finish(),  # last, since it raises for the problems of all
    )


def render_order(order: Order, served: Served) -> Order:
    """An order with the prompt of its messages, if it has any; Refused if they can't be one.

    It takes a moment, and belongs into a thread.
    """
    if not order.messages:
        return order
    assert served.converser is not None, "read_order() gives messages to chat models only"
    try:
        prompt = served.converser.prompt(order.messages, order.sampling["max_new_tokens"])
    except TooLongError as error:
        raise Refused(400, str(error), param="messages", code="context_length_exceeded") from None
    except PipelineError as error:
        raise Refused(400, str(error), param="messages") from None
    return dataclasses.replace(
        order,
        prompts=[prompt.ids],
        messages=[],
        sampling=order.sampling | {"max_new_tokens": prompt.most_new_tokens},
        stop_ids=served.converser.stop_ids,
        n_dropped=prompt.n_dropped,
    )


def _logprobs(fields: "_Fields", is_chat: bool) -> int | None:
    """How many of the likeliest tokens are wanted with each token; None for no logprobs."""
    is_right, allowed = _whole_number(0, MOST_LIKELIEST), f"a whole number to {MOST_LIKELIEST}"
    if not is_chat:
        n = fields.take("logprobs", False, lambda v: v is False or is_right(v), allowed)
        return None if n is False else n
    wanted = fields.take("logprobs", False, _is_bool, "true or false")
    n = fields.take("top_logprobs", 0, is_right, allowed)
    if n > 0 and not wanted:
        fields.wrong("top_logprobs", "top_logprobs needs logprobs to be true")
    return n if wanted else None


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body; Refused if it is none."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=int)  # int() refuses "NaN"
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise Refused(400, f"the body is not JSON: {place}: {error.msg}") from None
    except (RecursionError, ValueError):  # ValueError: NaN, thousands of digits
        message = "the body is nested too deeply, or has a number that is too long or not finite"
        raise Refused(400, message) from None
    if not isinstance(value, dict):
        raise Refused(400, f"the body is {shown(value)}; it must be an object")
    return value


class _Fields:
    """The parameters of a request, and their problems."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.problems: list[tuple[str, str]] = []  # parameter, what is wrong
        self._known = {"model", *WITHOUT_EFFECT}

    def take(self, name: str, default: Any, is_right: Callable[[Any], bool], allowed: str) -> Any:
        """A parameter's value, or the default if it is missing, null or wrong."""
        self._known.add(name)
        value = self.given.get(name)
        if value is None:
            return default
        if is_right(value):
            return value
        self.wrong(name, f"{name} is {shown(value)}; it must be {allowed}")
        return default

    def require(self, name: str, default: Any, is_right: Callable[[Any], bool], said: str) -> Any:
        """A parameter's value, which must not be missing or null; the default if it is wrong."""
        if self.given.get(name) is None:
            self.wrong(name, f"{name} is missing; it must be {said}")
        return self.take(name, default, is_right, said)

    def wrong(self, name: str, message: str) -> None:
        """Record a problem with a parameter."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append((name, message))

    def finish(self) -> list[str]:
        """Raise Refused for the problems; returns the names of parameters that nothing took.

        A parameter that would change the text, but that nothing took, is a problem.
        """
        for name, allowed in NEUTRAL.items():
            if name not in self._known:
                listed = " or ".join(map(shown, allowed))
                said = f"{listed} or left out: this server does not support it"
                self.take(name, None, allowed.__contains__, said)
        if self.problems:
            message = "; ".join(message for _, message in self.problems)
            raise Refused(400, message, param=self.problems[0][0])
        unknown = (n for n in self.given if n not in self._known and self.given[n] is not None)
        return [name[:LONGEST_NAME] for name in itertools.islice(unknown, MOST_IGNORED)]


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _whole_number(least: int, most: float) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most


def _is_penalty(value: Any) -> bool:
    return isinstance(value, int | float) and not _is_bool(value) and -2 <= value <= 2


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is text without lone surrogates, which JSON may have."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_model(name: str, served: Served) -> None:
    """Raise Refused, with 404, if no model of this name is served."""
    if name != served.model and name not in served.aliases:
        message = f"the model {shown(name)} does not exist; this server has {shown(served.model)}"
        raise Refused(404, message, param="model", code="model_not_found")


def _prompts(fields: _Fields, vocab_size: int) -> list[str | list[int]]:
    """The prompts of a completion, given as a text, token ids, or a list of either."""
    is_id = _whole_number(0, vocab_size - 1)

    def are_ids(value: Any) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(map(is_id, value))

    def is_right(value: Any) -> bool:
        if isinstance(value, list) and value and not are_ids(value):
            return all(map(_is_text, value)) or all(map(are_ids, value))
        return _is_text(value) or are_ids(value)

    allowed = f"text, token ids from 0 to {vocab_size - 1}, or a list of either"
    prompt = fields.require("prompt", "", is_right, allowed)
    return [prompt] if _is_text(prompt) or are_ids(prompt) else prompt


def _messages(fields: _Fields) -> list[Message]:
    """The messages of a conversation; those with problems are missing."""
    given = fields.require(
        "messages",
        [],
        lambda v: isinstance(v, list) and len(v) > 0,
        "a list of one or more messages",
    )
    messages = []
    for i, message in enumerate(given):
        if (read := _message(fields, f"messages[{i}]", message)) is not None:
            messages.append(read)
        if len(fields.problems) == MOST_PROBLEMS:
            break
    return messages


def _message(fields: _Fields, place: str, message: Any) -> Message | None:
    """A message, of parts their texts joined as in training; None if it is wrong."""
    roles = ", ".join(ROLES)
    if not isinstance(message, dict):
        fields.wrong("messages", f'{place} must be an object whose "role" is one of {roles}')
        return None
    role = message.get("role")
    if role not in ROLES:
        why = ": this server runs no tools" if role in ("tool", "function") else ""
        said = f"{place}.role is {shown(role)}; it must be one of {roles}{why}"
        fields.wrong("messages", said)
        return None
    for name in ("tool_calls", "function_call"):
        if message.get(name):
            said = f"{place}.{name} must be left out: this server runs no tools"
            fields.wrong("messages", said)
            return None
    role = SYSTEM if role == "developer" else role
    content = message.get("content")
    if content is None and role == ASSISTANT:
        return Message(role, "")
    if _is_text(content):
        return Message(role, content)
    parts: list[Any] = content if isinstance(content, list) else [None]
    if not all(
        isinstance(p, dict) and p.get("type") == "text" and _is_text(p.get("text")) for p in parts
    ):
        said = 'must be text, or a list of parts {"type": "text", "text": ...}'
        fields.wrong("messages", f"{place}.content is {shown(content)}; it {said}")
        return None
    return Message(role, content_text(parts))


def _stop_strings(fields: _Fields) -> list[str]:
    def is_stop(value: Any) -> bool:
        return _is_text(value) and len(value) <= LONGEST_STOP

    stop = fields.take(
        "stop",
        [],
        lambda v: (
            is_stop(v) or (isinstance(v, list) and len(v) <= MOST_STOPS and all(map(is_stop, v)))
        ),
        f"text of at most {LONGEST_STOP} characters, or a list of at most {MOST_STOPS} such",
    )
    return [text for text in ([stop] if isinstance(stop, str) else stop) if text]


def _sampling(fields: _Fields, served: Served, *, is_chat: bool) -> dict[str, Any]:
    """All fields of SamplingConfig; null switches top_k and top_p off, and keeps the others.

    A length beyond the limit becomes the limit. A message has one token or more.
    """
    least = 1 if is_chat else 0
    default_length = served.sampling["max_new_tokens"]
    if is_chat and served.answer_length is not None:
        default_length = served.answer_length
    limit = served.answer_limit
    allowed = f"a whole number from {least}; this server writes {limit} tokens at most"
    is_right = _whole_number(least, math.inf)
    lengths = {fields.take(name, None, is_right, allowed) for name in LENGTHS}
    lengths = {min(length, limit) for length in lengths if length is not None}
    if len(lengths) > 1:
        fields.wrong(LENGTHS[0], f"{' and '.join(LENGTHS)} differ; give one of them")
    given = {}
    for field in dataclasses.fields(SamplingConfig):
        if field.name == "max_new_tokens":
            continue
        fields.take(field.name, None, lambda value: True, "")
        if field.name in fields.given:
            value = fields.given[field.name]
            if field.name == "top_k" and not _is_bool(value) and value in (0, -1):
                value = None  # as on other servers
            if value is not None or "None" in str(field.type):
                given[field.name] = value
    for problem in find_problems(SamplingConfig, given):
        name, allowed = problem.partition(" ")[0], problem.partition("; it must be ")[2]
        allowed = allowed.replace(" or None", " or null")
        fields.wrong(name, f"{name} is {shown(given[name])}; it must be {allowed}")
    length = lengths.pop() if lengths else default_length
    return served.sampling | given | {"max_new_tokens": length}


class _Drawn(NamedTuple):
    """A token of a text, as the logprobs of an answer have it."""

    id: int
    logprob: float | None  # None for a prompt's first token
    likeliest: tuple[tuple[int, float], ...]
    offset: int  # characters of the text before it


class Answer:
    """The shapes of one answer: a single object, or the chunks of a stream."""

    def __init__(self, order: Order, served: Served) -> None:
        self._order, self._tokenizer = order, served.tokenizer
        kind = "chat.completion" if order.is_chat else "text_completion"
        chunked = order.is_chat and order.stream
        self._head = {
            "id": ("chatcmpl-" if order.is_chat else "cmpl-") + uuid.uuid4().hex,
            "object": kind + ".chunk" if chunked else kind,
            "created": int(time.time()),
            "model": served.model,
            "system_fingerprint": served.fingerprint,
        }
        n_rows = len(order.prompts) * order.n
        self._lengths = [0] * n_rows  # characters so far of each row
        self._n_drawn = 0
        # of an answer without streaming
        self._texts = [io.StringIO() for _ in range(n_rows)]
        self._tokens: list[list[_Drawn]] = [[] for _ in range(n_rows)]
        self._finishes: list[str | None] = [None] * n_rows

    def add(self, part: Echo | Piece) -> None:
        """Keep a part for whole()."""
        self._tokens[part.row] += self._drawn(part)
        self._texts[part.row].write(part.text)
        self._finishes[part.row] = part.finish

    def whole(self, n_prompt_tokens: int) -> dict[str, Any]:
        """The answer without streaming, from all parts."""
        choices = []
        for row, finish in enumerate(self._finishes):
            text = self._texts[row].getvalue()
            message = {"message": {"role": "assistant", "content": text}}
            said = message if self._order.is_chat else {"text": text}
            choices.append(self._choice(row, said, self._logprobs(self._tokens[row]), finish))
        return self._head | {"choices": choices, "usage": self.usage(n_prompt_tokens)}

    def chunk(self, part: Echo | Piece) -> dict[str, Any] | None:
        """The chunk for a part; None if it would be empty."""
        logprobs = self._logprobs(self._drawn(part))
        if not part.text and part.finish is None and logprobs is None:
            return None
        said = {"delta": {"content": part.text}} if self._order.is_chat else {"text": part.text}
        return self._chunk([self._choice(part.row, said, logprobs, part.finish)])

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before the first piece: the role in a conversation."""
        if not self._order.is_chat:
            return []
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(row, said)]) for row in range(len(self._lengths))]

    def closing(self, n_prompt_tokens: int) -> list[dict[str, Any]]:
        """The chunks after the last piece: the usage if it was requested."""
        if not self._order.include_usage:
            return []
        return [self._chunk([]) | {"usage": self.usage(n_prompt_tokens)}]

    def usage(self, n_prompt_tokens: int) -> dict[str, int]:
        """The numbers of prompt and drawn tokens, including end-of-text."""
        return {
            "prompt_tokens": n_prompt_tokens,
            "completion_tokens": self._n_drawn,
            "total_tokens": n_prompt_tokens + self._n_drawn,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._order.include_usage else {}
        return self._head | {"choices": choices} | usage

    def _choice(
        self,
        row: int,
        said: Mapping[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        return {"index": row, **said, "logprobs": logprobs, "finish_reason": finish}

    def _drawn(self, part: Echo | Piece) -> list[_Drawn]:
        """The tokens of a part, if logprobs are requested; counts its tokens and characters."""
        start = self._lengths[part.row]
        self._lengths[part.row] += len(part.text)
        if isinstance(part, Piece):
            self._n_drawn += 1
            token = part.token
            drawn = [_Drawn(token.id, token.logprob, token.likeliest, start)]
            return [] if self._order.logprobs is None else drawn
        decoder, drawn = self._tokenizer.decoder(), []
        for id, known in part.tokens:
            logprob, likeliest = (known.logprob, known.likeliest) if known else (None, ())
            drawn.append(_Drawn(id, logprob, likeliest, start))
            start += len(decoder.add(id))
        return drawn

    def _logprobs(self, tokens: Sequence[_Drawn]) -> dict[str, Any] | None:
        """The log-probabilities of tokens in the endpoint's shape, if requested."""
        if self._order.logprobs is None:
            return None
        if self._order.is_chat:
            return {"content": [self._chat_entry(token) for token in tokens]}
        tops = [self._top(token) for token in tokens] if self._order.logprobs > 0 else None
        return {
            "tokens": [self._tokenizer.token_text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: _Drawn) -> dict[str, float] | None:
        """The likeliest tokens and the drawn one with their logprobs, by their texts."""
        if token.logprob is None:
            return None
        top: dict[str, float] = {}
        for id, logprob in (*token.likeliest, (token.id, token.logprob)):
            # the best of parts of characters
            top.setdefault(self._tokenizer.token_text(id), logprob)
        return top

    def _chat_entry(self, token: _Drawn) -> dict[str, Any]:
        def entry(id: int, logprob: float | None) -> dict[str, Any]:
            text = self._tokenizer.token_text(id)
            return {"token": text, "logprob": logprob, "bytes": self._bytes(id)}

        tops = [entry(*likely) for likely in token.likeliest]
        return entry(token.id, token.logprob) | {"top_logprobs": tops}

    def _bytes(self, id: int) -> list[int] | None:
        if isinstance(self._tokenizer, ForeignTokenizer):  # its tokens have no bytes
            return None
        return list(self._tokenizer.token_bytes(id))
