"""The server for other people's programs: where they ask from, and what they send."""

import asyncio

import httpx
import pytest

from scripts.serving.guard import Guard, json_response

TOKEN = "open-sesame"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}
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

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(guard)
        async with httpx.AsyncClient(transport=transport, base_url="http://a") as client:
            return await client.request(method, "/v1/models", headers=headers | {"Host": host})

    return asyncio.run(answer())


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


def test_without_a_token_only_this_machine_is_known_at_its_own_port():
    guard = Guard(hello, host="127.0.0.1", port=8000, token=None)
    assert ask(guard, "localhost:8000").status_code == 200
    for host in ("localhost:9000", "localhost", *CONTAINERS, *NEAR, *REBINDING):
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
        "expose-headers": "x-served-model",
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
