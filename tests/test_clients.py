"""The server for other people's programs: where they ask from, and what they send."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from generation import SamplingConfig, stream_text
from scripts.conversation import converser_of
from scripts.serving import app, writer
from scripts.serving.guard import Guard, json_response
from scripts.serving.protocol import Served
from tests.conversing import chat_model
from tests.letters import model_for
from tests.serving import chunks_of, sent
from text.tokenizer import CharTokenizer

TOKEN = "open-sesame"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
HERE = ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LocalHost:8000")
AT_80, ADDRESSES = ("localhost", "localhost:80", "[::1]"), ("192.168.1.5:8000", "[fe80::1]:8000")
LOCAL = ("localhost", "localhost:9000", "127.0.0.1:9000", "[::1]:2222", "LOCALHOST:8000")
CONTAINERS = ("host.docker.internal:8000", "host.docker.internal", "host.containers.internal:9000")
NEAR = ("mybox.local:8000", "192.168.1.5:8000", "[fd00::5]:9000", "desk:8000", "desk.lan")
REBINDING = (
    "evil.example:8000",
    "evil.example",
    "localhost.evil.example:8000",
    "host.docker.internal.evil.example:8000",
    "mybox.local.evil.example:8000",
    "evil.example.local:8000",
    "192.168.1.5.evil.example:8000",
    "localhost:8000:8000",
    "localhost:evil",
    ".local",
    "",
)


async def hello(scope, receive, send) -> None:
    """An application for a guard to keep."""
    await json_response({})(scope, receive, send)


def ask(guard: Guard, host: str, method: str = "GET", **headers: str) -> httpx.Response:
    """A guard's answer to a request with this Host header."""
    given = [(k.lower().encode(), v.encode()) for k, v in (headers | {"Host": host}).items()]
    scope = {"type": "http", "method": method, "path": "/v1/models", "headers": given}
    start, body = [], []

    async def send(message) -> None:
        (start if message["type"] == "http.response.start" else body).append(message)

    asyncio.run(guard(scope, None, send))
    content = b"".join(part["body"] for part in body)
    return httpx.Response(start[0]["status"], headers=start[0]["headers"], content=content)


@pytest.fixture(autouse=True)
def named_desk(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "Desk.lan")


# ---------------------------------------------------------------------- where they ask from


@pytest.mark.parametrize(
    ("address", "known", "unknown"),
    [
        ("127.0.0.1", (*LOCAL, *CONTAINERS), (*NEAR, "gpt:8000")),
        ("0.0.0.0", (*LOCAL, *CONTAINERS, *NEAR), ("gpt:8000", "other.lan:8000")),
        ("192.168.1.5", (*LOCAL, *CONTAINERS, *NEAR), ("gpt:8000",)),
    ],
)
def test_with_a_token_containers_tunnels_and_the_local_network_are_known_but_no_other_name(
    address, known, unknown
):
    guard = Guard(hello, host=address, port=8000, token=TOKEN)
    for host in known:
        assert ask(guard, host, **RIGHT).status_code == 200, host
        assert ask(guard, host).status_code == 401, host
        assert ask(guard, host, Origin=f"http://{host}", **RIGHT).status_code == 200, host
        for origin in ("http://evil.example", "http://localhost:3000", "null"):
            assert ask(guard, host, Origin=origin, **RIGHT).status_code == 403, (host, origin)
    for host in (*unknown, *REBINDING):
        refused = ask(guard, host, **RIGHT)
        assert refused.status_code == 403, host
        assert "--allow-host NAME" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("address", "port", "known", "unknown"),
    [
        ("127.0.0.1", 8000, HERE, ("localhost:9000", "localhost", *NEAR)),
        ("FE80::1", 8000, (*HERE, "[fe80::1]:8000"), ("192.168.1.5:8000",)),
        ("0.0.0.0", 8000, (*HERE, *ADDRESSES), ("192.168.1.5:8001", "192.168.1.5")),
        ("0.0.0.0", 80, (*AT_80, "192.168.1.5", "192.168.1.5:80", "[fd00::5]"), ADDRESSES),
        ("127.0.0.1", 80, AT_80, ("192.168.1.5",)),
    ],
)
def test_without_a_token_only_names_of_this_machine_and_port_and_its_own_pages_are_known(
    address, port, known, unknown
):
    guard = Guard(hello, host=address, port=port, token=None)
    for host in known:
        assert ask(guard, host).status_code == 200, host
        assert ask(guard, host, Origin=f"http://{host}").status_code == 200, host
        for origin in ("http://evil.example", "null", "", f"https://{host}", f"http://{host}1"):
            assert ask(guard, host, Origin=origin).status_code == 403, (host, origin)
    for host in (*unknown, *CONTAINERS, *REBINDING):
        refused = ask(guard, host)
        assert refused.status_code == 403, host
        assert "with --token" in refused.json()["error"]["message"]


def test_an_allowed_name_is_known_and_those_that_only_look_like_it_are_not():
    hosts = ("gpt", "models.example.org", "fd00::7")
    guard = Guard(hello, host="127.0.0.1", port=8000, token=TOKEN, hosts=hosts)
    for host in ("gpt:8000", "GPT", "models.example.org", "[fd00::7]:8000"):
        assert ask(guard, host, **RIGHT).status_code == 200, host
        assert ask(guard, host).status_code == 401, host
    for host in ("gpt.evil.example", "example.org", "a.models.example.org", *REBINDING):
        assert ask(guard, host, **RIGHT).status_code == 403, host


def test_pages_of_an_allowed_origin_may_ask_with_the_token_and_no_others():
    origin, host = "http://localhost:3000", "localhost:8000"
    guard = Guard(hello, host="127.0.0.1", port=8000, token=TOKEN, origins=[origin])
    asked = {"Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,x-stainless-lang"
    asked["Access-Control-Request-Private-Network"] = "true"
    told = ask(guard, host, "OPTIONS", Origin=origin, **asked)
    assert (told.status_code, told.content) == (204, b"")
    shared = {k[15:]: v for k, v in told.headers.items() if k.startswith("access-control-")}
    assert shared == {
        "allow-origin": origin,
        "allow-methods": "GET, POST",
        "allow-headers": "authorization,x-stainless-lang",
        "allow-private-network": "true",
        "expose-headers": "x-served-model, x-dropped-messages",
        "max-age": "600",
    }
    for headers, status in ((RIGHT, 200), ({}, 401)):  # a page can read why it was refused
        answer = ask(guard, host, Origin=origin, **headers)
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["vary"] == "Origin"
    for other in ("http://localhost:3001", "https://localhost:3000", f"{origin}.evil.example"):
        for method in ("OPTIONS", "POST"):
            refused = ask(guard, host, method, Origin=other, **asked, **RIGHT)
            assert refused.status_code == 403
            assert "--allow-origin" in refused.json()["error"]["message"]
            assert "access-control-allow-origin" not in refused.headers
    for name in REBINDING:
        assert ask(guard, name, "OPTIONS", Origin=origin, **asked).status_code == 403, name
        assert ask(guard, name, Origin=origin, **RIGHT).status_code == 403, name


# ------------------------------------------------------------------------- what they send

TEXT = "The ferry crossed the river at dawn. Its bell rang twice, and nobody came.\n"
LIMIT = 8  # tokens of an answer
CONTEXT = 64


@pytest.fixture(scope="module")
def run() -> SimpleNamespace:
    """A run's tiny model that has learnt nothing."""
    tokenizer = CharTokenizer(TEXT)
    model = model_for(tokenizer, 0.3, emb_dim=16, n_heads=2, context_length=CONTEXT)
    with torch.no_grad():
        # it writes characters of the text, never their bytes or an end of text
        odd = [*{*range(tokenizer.vocab_size)}.difference(tokenizer.encode(TEXT))]
        model.final_norm.bias[0], model.head.weight[odd] = 10.0, -10.0
    device = torch.device("cpu")
    return SimpleNamespace(model=model, tokenizer=tokenizer, device=device, path=Path("tiny"))


@pytest.fixture
def send(run):
    """A function that sends bodies to the server's application, one after another."""
    sampling = vars(SamplingConfig(max_new_tokens=5, temperature=0.0))
    served = Served("tiny", ("quick",), 0, "", run.tokenizer, sampling, 1, LIMIT)

    def send(*asked: tuple[str, Any]) -> list[httpx.Response]:
        return sent(run, served, *asked, token=TOKEN)

    return send


@pytest.fixture
def send_to_chat_model():
    """As send, to a chat model."""
    run, sampling = chat_model(), vars(SamplingConfig(max_new_tokens=5, temperature=0.0))
    known = ("tiny", ("quick",), 0, "", run.tokenizer, sampling, 1, LIMIT, converser_of(run), LIMIT)

    def send(*asked: tuple[str, Any]) -> list[httpx.Response]:
        return sent(run, Served(*known), *asked, token=TOKEN)

    return send


def complete(send, **body: Any) -> dict[str, Any]:
    """The answer to one completion."""
    (answer,) = send(("completions", {"model": "tiny", "prompt": "The ferry"} | body))
    assert answer.status_code == 200, answer.text
    return answer.json()


def written(run, prompt: str, **options: Any) -> str:
    """What the model writes greedily, without a server."""
    options = {"temperature": 0.0, "max_new_tokens": 5} | options
    return "".join(p.text for p in stream_text(run.model, run.tokenizer, [prompt], **options))


CHAT, TEXTS = "chat/completions", "completions"
# what programs really send: the client, where to, the body, and what a request that is refused says
REQUESTS = (Path(__file__).parent / "recorded_requests.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["send", "send_to_chat_model"])
def test_every_recorded_request_is_answered_or_told_what_to_do(kind, request):
    send = request.getfixturevalue(kind)
    requests = list(map(json.loads, REQUESTS.splitlines()))
    if kind == "send_to_chat_model":  # which has a larger context: completions are the same
        requests = [asked for asked in requests if asked["path"] == CHAT]
    assert len(requests) >= 35
    clients = {asked["client"] for asked in requests}
    assert clients >= {"Open WebUI", "SillyTavern", "LangChain", "LibreChat", "lm-eval", "curl"}
    answers = send(*((asked["path"], asked.get("body")) for asked in requests))
    for asked, answer in zip(requests, answers, strict=True):
        body, place = asked.get("body", {}), f"{asked}: {answer.text}"
        if "told" in asked:
            assert answer.status_code == 400, place
            assert asked["told"] in answer.json()["error"]["message"], place
            continue
        assert answer.status_code == 200, place
        if body.get("stream"):
            chunks = chunks_of(answer)
            assert not any("error" in chunk for chunk in chunks), place
            finishes = [c["finish_reason"] for chunk in chunks for c in chunk["choices"]]
            assert finishes.count(None) < len(finishes), place
        elif body:
            prompts, n = body.get("prompt"), body.get("n") or 1
            is_list = isinstance(prompts, list) and not isinstance(prompts[0], int)
            assert len(answer.json()["choices"]) == (len(prompts) if is_list else 1) * n, place


def test_an_answer_ends_at_the_limit_where_more_is_asked_for(send, run):
    for body in ({"max_tokens": 8192}, {"max_completion_tokens": 10**30, "max_tokens": LIMIT}):
        answer = complete(send, **body)
        assert answer["choices"][0]["text"] == written(run, "The ferry", max_new_tokens=LIMIT)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == LIMIT


def test_another_models_name_is_answered_with_a_header_that_names_this_one(send):
    for name, header in (("gpt-4", "tiny"), (None, "tiny"), ("tiny", None), ("quick", None)):
        for stream in (False, True):
            body = {"model": name, "prompt": "The", "stream": stream}
            (answer,) = send(("completions", body))
            assert answer.status_code == 200
            assert answer.headers.get("x-served-model") == header, (name, stream)
            assert '"model":"tiny"' in answer.text
    (answer,) = send(("models/gpt-4", None))
    assert answer.status_code == 404


def test_an_unknown_field_is_noted_once_by_its_name_and_never_its_value(send, capsys):
    right = {"prompt": "The", "model": "tiny", "max_tokens": 1}
    bodies = [{"num_ctx": 4711}, {"num_ctx": 4712, "typical_p": 1, "mirostat": None}, {}]
    bodies += [{"\x1b[2J" + "x" * 100: 4713}]
    send(*((TEXTS, right | body) for body in bodies))
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line]
    known = [line for line in lines if "num_ctx" in line or "typical_p" in line]
    assert len(known) == 2
    assert len(lines) == 3
    assert "471" not in printed
    assert "mirostat" not in printed
    assert "\x1b" not in printed
    assert max(map(len, lines)) < 200
    many = {f"key{i}": 1 for i in range(60_000)}
    send((TEXTS, right | many), (TEXTS, right | {f"more{i}": 1 for i in range(1000)}))
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == app.MOST_IGNORED


def test_a_long_list_of_prompts_is_written_in_batches_and_answered_in_order(send, run, monkeypatch):
    sizes, real = [], writer.stream_text

    def noting(model, tokenizer, prompts, **options):
        sizes.append(len(prompts) * options["num_samples"])
        return real(model, tokenizer, prompts, **options)

    monkeypatch.setattr(writer, "stream_text", noting)
    prompts = [TEXT[i : i + 3] for i in range(20)]
    expected = [text for prompt in prompts for text in [written(run, prompt)] * 3]
    answer = complete(send, prompt=prompts, n=3)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(60))
    assert answer["usage"]["completion_tokens"] == 60 * 5
    assert sizes == [15] * 4
    (streamed,) = send((TEXTS, {"prompt": prompts, "n": 3, "stream": True}))
    texts = [""] * 60
    for event in streamed.text.split("\n\n")[:-2]:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected
    assert max(sizes) <= writer.MOST_ROWS


def logprobs_of(run, ids: list[int]) -> torch.Tensor:
    """(T, V) log-probabilities of each position's next token, by one forward pass."""
    with torch.no_grad():
        return run.model(torch.tensor([ids]))[0].float().log_softmax(-1)


def test_penalties_are_those_of_the_definition(send, run):
    for frequency, presence in ((2, 0), (0, 2), (1.5, 0.5), (-2, 0), (0, -1)):
        ids = run.tokenizer.encode("The ferry")  # the prompt's own tokens do not count
        n_read, counts = len(ids), torch.zeros(run.tokenizer.vocab_size)
        for _ in range(LIMIT):
            logits = logprobs_of(run, ids)[-1]
            ids.append(int((logits - frequency * counts - presence * (counts > 0)).argmax()))
            counts[ids[-1]] += 1
        body = {"frequency_penalty": frequency, "presence_penalty": presence, "logprobs": 0}
        answer = complete(send, max_tokens=LIMIT, prompt=["The", "The ferry"], **body)
        choice = answer["choices"][1]
        assert choice["text"] == run.tokenizer.decode(ids[n_read:]), body
        # what is reported is the model's own probability
        after, drawn = logprobs_of(run, ids)[n_read - 1 : -1], torch.tensor(ids[n_read:])
        expected = after.gather(1, drawn[:, None])[:, 0]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_with_logprobs_gives_each_token_of_the_prompt_its_probability(send, run, max_tokens):
    prompts = ["The ferry", "T", TEXT[:CONTEXT]]
    body = {"prompt": prompts, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    answer = complete(send, **body)
    assert answer["usage"]["completion_tokens"] == max_tokens * len(prompts)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        more = written(run, prompt, max_new_tokens=max_tokens) if max_tokens else ""
        assert (choice["text"], choice["finish_reason"]) == (prompt + more, "length")
        found, ids = choice["logprobs"], run.tokenizer.encode(prompt)
        assert "".join(found["tokens"]) == prompt + more
        assert found["text_offset"] == list(range(len(prompt + more)))
        assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        after = logprobs_of(run, ids)[:-1]
        expected = after.gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None])[:, 0].tolist()
        read = found["token_logprobs"][1 : len(ids)]
        assert read == pytest.approx(expected, abs=1e-4)
        for row, top, token, logprob in zip(
            after, found["top_logprobs"][1:], found["tokens"][1:], read, strict=False
        ):
            best = {run.tokenizer.decode([i]): row[i].item() for i in row.topk(2).indices.tolist()}
            assert top == pytest.approx({token: logprob} | best, abs=1e-4)
        drawn = slice(len(ids), None)  # the likeliest ones, greedily
        highest = [max(top.values()) for top in found["top_logprobs"][drawn]]
        assert found["token_logprobs"][drawn] == highest
    plain = complete(send, **body | {"logprobs": None})
    assert [c["text"] for c in plain["choices"]] == [c["text"] for c in answer["choices"]]
    (streamed,) = send((TEXTS, body | {"stream": True, "prompt": prompts[0]}))
    events = [e.removeprefix("data: ") for e in streamed.text.split("\n\n")[:-2]]
    chunks = [json.loads(event)["choices"][0] for event in events]
    # beside other prompts the last digits may differ on some processors
    (alone,) = complete(send, **body | {"prompt": prompts[0]})["choices"]
    assert "".join(chunk["text"] for chunk in chunks) == alone["text"]
    assert alone["text"] == answer["choices"][0]["text"]
    joined = [p for chunk in chunks for p in chunk["logprobs"]["token_logprobs"]]
    assert joined[1:] == pytest.approx(alone["logprobs"]["token_logprobs"][1:])
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == ["length"]


def test_a_conversation_names_the_likeliest_tokens_where_they_are_asked_for(send, run):
    body = {"messages": [{"role": "user", "content": "The ferry"}], "top_logprobs": 3}
    right, wrong = send((CHAT, body | {"logprobs": True}), (CHAT, body))
    assert wrong.status_code == 400
    (choice,) = right.json()["choices"]
    ids = run.tokenizer.encode("The ferry")
    for entry in choice["logprobs"]["content"]:
        assert entry["logprob"] == max(top["logprob"] for top in entry["top_logprobs"])
        assert bytes(entry["bytes"]).decode() == entry["token"]
        best = logprobs_of(run, ids)[-1].topk(3)
        tops = entry["top_logprobs"]
        assert [top["logprob"] for top in tops] == pytest.approx(best.values.tolist(), abs=1e-4)
        names = [run.tokenizer.decode([i]) for i in best.indices.tolist()]
        assert [top["token"] for top in tops] == names
        assert [bytes(top["bytes"]).decode() for top in tops] == names
        ids += run.tokenizer.encode(entry["token"])


def test_more_prompt_tokens_than_can_be_scored_at_once_are_told(send, monkeypatch):
    monkeypatch.setattr(writer, "MOST_SCORED", 100)
    body = {"prompt": ["The ferry"] * 12, "echo": True, "logprobs": 1, "max_tokens": 1}
    (answer,) = send((TEXTS, body))
    assert answer.status_code == 400
    assert "send fewer at once" in answer.json()["error"]["message"]
