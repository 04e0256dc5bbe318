"""Serve a trained model on this machine:  python -m scripts.serve

It has a page at / for people, and OpenAI's API at /v1 for programs. Only this machine can connect
unless --host and --token allow others.
"""

import argparse
import asyncio
import errno
import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from importlib.util import find_spec

from engine.starting import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

from engine.errors import ResourceError, SettingsError
from engine.settings import raise_if_any, shown
from exchange.saved_run import LoadedModel
from scripts.options import (
    add_run_options,
    add_sampling_options,
    answer_length_of,
    flag_of,
    load,
    new_parser,
    run_program,
    sampling_of,
    seed_of,
)
from storage.files import SETTINGS

BACKLOG = 2048  # connections that may wait to be accepted
HOST = r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_-])?|[0-9a-f:]*:[0-9a-f:.]*"  # a name, IPv4 or IPv6
ORIGIN = r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"
# exact, as in requirements-dev.txt: guard.py and app.py extend internal classes of uvicorn
INSTALL = "pip install starlette==1.10.0 uvicorn==0.54.0"


def main() -> int:
    """Read the options, bind the port, load the run and serve it until Ctrl-C; returns 0."""
    arguments = _options()
    for library in ("starlette", "uvicorn"):
        if find_spec(library) is None:
            raise SettingsError(f"{library} is not installed: {INSTALL}")
    with listen(arguments.host, arguments.port) as listener:
        run = load(arguments)
        asyncio.run(_serve(arguments, run, listener))
    return 0


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_run_options(parser)
    group = parser.add_argument_group("the server")
    add_address_options(group, port=8000)
    group.add_argument(
        "--allow-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="a site whose pages may ask, such as http://localhost:3000; needs --token, may be "
        "repeated",
    )
    group.add_argument(
        "--answer-limit", metavar="N", default="4096", help="most tokens of an answer (4096)"
    )
    group.add_argument(
        "--queue-limit", metavar="N", default="8", help="requests that may wait their turn (8)"
    )
    add_sampling_options(parser)
    return _checked(parser.parse_args())


def add_address_options(group: argparse._ActionsContainer, *, port: int) -> None:
    """Add --port, --host, --token and --allow-host, which check_address() reads."""
    group.add_argument(
        "--port", metavar="N", default=str(port), help=f"0 takes a free one ({port})"
    )
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on; any but this machine's own needs --token (127.0.0.1)",
    )
    group.add_argument(
        "--token",
        default=os.environ.get("GPT_SERVE_TOKEN") or None,
        help="what clients must know; other users of this machine may see options, so the "
        "environment variable GPT_SERVE_TOKEN serves too",
    )
    group.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="another name that clients may reach this server by; needs --token, may be repeated",
    )


def _checked(arguments: argparse.Namespace) -> argparse.Namespace:
    """The options with their numbers parsed; SettingsError with every wrong one."""
    limits = {"answer_limit": (1, 100_000), "queue_limit": (0, 1000)}
    problems = check_address(arguments, limits) + _check_names(
        arguments,
        "allow_origin",
        ORIGIN,
        "a scheme and a host, such as http://localhost:3000, each named",
    )
    raise_if_any(problems, "the options")
    return arguments


def check_address(
    arguments: argparse.Namespace, limits: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Parse the port and other whole numbers, of which the limits are given, and put names into
    lower case; returns the problems of these and of the address."""
    problems = []
    for name, (least, most) in ({"port": (0, 65_535)} | dict(limits)).items():
        text = getattr(arguments, name)
        number = int(text) if re.fullmatch("[0-9]{1,6}", text) else -1
        if not least <= number <= most:
            allowed = f"it must be a whole number from {least} to {most}"
            problems.append(f"{flag_of(name)} is {shown(text)}; {allowed}")
        setattr(arguments, name, number)
    token = arguments.token
    if token is not None and not re.fullmatch("[!-~]{8,}", token):  # and it stays secret
        problems.append("--token must be 8 or more ASCII letters, digits or signs without blanks")
    if arguments.host == "localhost":
        arguments.host = "127.0.0.1"
    if token is None and arguments.host not in ("127.0.0.1", "::1"):
        problems.append(
            f"--host {shown(arguments.host)} lets other machines in, so it needs --token: "
            "a secret of 8 or more characters that clients must know"
        )
    allowed = "a host name or an address, such as mybox.lan, without a port"
    return problems + _check_names(arguments, "allow_host", HOST, allowed)


def _check_names(arguments: argparse.Namespace, name: str, pattern: str, allowed: str) -> list[str]:
    """Put an option that may be repeated into lower case; returns its problems."""
    given = [text.lower() for text in getattr(arguments, name)]
    setattr(arguments, name, given)
    problems = [
        f"{flag_of(name)} is {shown(text)}; it must be {allowed}"
        for text in given
        if not re.fullmatch(pattern, text)
    ]
    if given and arguments.token is None:
        problems.append(f"{flag_of(name)} lets others in, so it needs --token")
    return problems


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ResourceError if the port is taken, with a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            with socket.create_server((host, 0), family=family) as other:
                free = other.getsockname()[1]
            reason = "is in use" if error.errno == errno.EADDRINUSE else "is not for this user"
            raise ResourceError(f"port {port} {reason}. Try --port {free}.") from None
        raise ResourceError(f"can't listen on {shown(host)}: {error.strerror or error}.") from None


def known_as(host: str, listener: socket.socket) -> str:
    """The host as given, or the wildcard address that it stands for, as "0" does."""
    bound = listener.getsockname()[0]
    return bound if bound in ("0.0.0.0", "::") else host


async def _serve(arguments: argparse.Namespace, run: LoadedModel, listener: socket.socket) -> None:
    from scripts.conversation import converser_of
    from scripts.serving.app import Application, Server
    from scripts.serving.guard import bracketed
    from scripts.serving.protocol import Served
    from scripts.serving.writer import Writer

    sampling, converser = sampling_of(arguments, run), converser_of(run)
    if sampling["max_new_tokens"] > arguments.answer_limit:
        raise SettingsError(
            f"max_new_tokens is {sampling['max_new_tokens']}, more than --answer-limit "
            f"{arguments.answer_limit} allows; change one of them"
        )
    aliases, created = set(), time.time()
    if run.path is not None:
        aliases = {run.path.name, run.settings["model_name"]}
        created = (run.path / SETTINGS).stat().st_mtime
    served = Served(
        model=run.name,
        aliases=tuple(aliases),
        created=int(created),
        fingerprint=f"{run.version}-{run.weights}".replace(" ", "-"),
        tokenizer=run.tokenizer,
        sampling=sampling,
        seed=None if arguments.seed is None else seed_of(arguments),
        answer_limit=arguments.answer_limit,
        converser=converser,
        answer_length=min(answer_length_of(arguments, run), arguments.answer_limit)
        if converser is not None
        else None,
    )
    host, port = known_as(arguments.host, listener), listener.getsockname()[1]
    writer = Writer(run, arguments.queue_limit)
    app = Application(run, served, writer).guarded(
        host=host,
        port=port,
        token=arguments.token,
        hosts=arguments.allow_host,
        origins=arguments.allow_origin,
    )
    greeting = (
        f"http://{bracketed(host)}:{port}/ serves {run.name}, {run.version}, "
        f"{run.weights} weights (Ctrl-C ends it)"
    )
    # it would report every client that disconnects
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    try:
        await Server(app, writer, greeting).serve(sockets=[listener])
    finally:
        writer.close()


if __name__ == "__main__":
    run_program(main)
