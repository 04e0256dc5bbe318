"""Watch your runs while they train, in a browser:  python -m scripts.watch

A page of all runs in OUTPUT_DIR: curves as they grow, samples, the time that is left, a button that
stops a run as Ctrl-C does, and a text to write with the newest checkpoint. Only this machine can
connect, and only with the token in the address that is printed.
"""

import argparse
import asyncio
import logging
import secrets
from importlib.util import find_spec
from pathlib import Path

from engine.starting import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()

from engine.console import tell
from engine.devices import find_device_fault
from engine.errors import SettingsError
from engine.settings import raise_if_any, shown
from exchange.saved_run import runs_folder
from scripts.options import new_parser, run_program
from scripts.serve import INSTALL, add_address_options, check_address, known_as, listen


def main() -> int:
    """Read the options, bind the port and serve the page until Ctrl-C; returns 0."""
    arguments = _options()
    for library in ("starlette", "uvicorn"):
        if find_spec(library) is None:
            raise SettingsError(f"{library} is not installed: {INSTALL}")
    folder = runs_folder() if arguments.runs is None else Path(arguments.runs).expanduser()
    if not folder.is_dir():
        tell(f"Note: there is no folder {folder} yet; its runs appear when they begin")
    with listen(arguments.host, arguments.port) as listener:
        asyncio.run(_serve(arguments, folder, listener))
    return 0


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--runs", metavar="FOLDER", help="the folder with the runs (OUTPUT_DIR of config_run.py)"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help='where "write with it" computes: a GPU that trains needs its memory itself (cpu)',
    )
    add_address_options(parser.add_argument_group("the server"), port=8001)
    arguments = parser.parse_args()
    problems = check_address(arguments, {})
    if fault := find_device_fault(arguments.device):
        problems.append(f"--device is {shown(arguments.device)}; it {fault}")
    raise_if_any(problems, "the options")
    return arguments


async def _serve(arguments: argparse.Namespace, folder: Path, listener) -> None:
    from scripts.serving.app import Server
    from scripts.serving.guard import bracketed
    from scripts.watching.app import Watch

    # other users of this machine can connect too, and a stop is not for them
    token = arguments.token or secrets.token_urlsafe(16)
    host, port = known_as(arguments.host, listener), listener.getsockname()[1]
    watch = Watch(folder, arguments.device)
    app = watch.guarded(host=host, port=port, token=token, hosts=arguments.allow_host)
    shown_token = "" if arguments.token else f"#{token}"  # one of your own you know
    greeting = (
        f"http://{bracketed(host)}:{port}/{shown_token} watches the runs in {folder} "
        "(Ctrl-C ends it)"
    )
    # it would report every client that disconnects
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    try:
        await Server(app, watch, greeting).serve(sockets=[listener])
    finally:
        watch.close()


if __name__ == "__main__":
    run_program(main)
