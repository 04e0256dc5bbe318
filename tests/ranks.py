"""Start programs as several ranks under torchrun, on the CPU, and look at what they left."""

import json
import subprocess
from pathlib import Path

from tests.forking import CAN_FORK
from tests.launching import NET_S, Program


def start_ranks(
    folder: Path,
    n: int,
    *arguments: str,
    program: str,
    env: dict[str, str] | None = None,
    options: tuple[str, ...] = (),
    fresh: bool = False,
) -> Program:
    """Start a program as n ranks under torchrun, in a folder; without torchrun where n is 1.

    options are further ones of torchrun; fresh interpreters are slower to start than forks. Whoever
    starts a job ends it: by run_ranks(), or end().
    """
    number = len(list(folder.glob("program-*.py")))
    script = folder / f"program-{number}.py"
    script.write_text(program, encoding="utf-8")
    if n == 1:
        code = f"import runpy, sys; sys.argv = {[str(script), *arguments]}\n"
        code += "runpy.run_path(sys.argv[0], run_name='__main__')"
        return Program(folder, number, code, env=env or {})
    command = ["--standalone", f"--nproc-per-node={n}", *options, str(script), *arguments]
    code = f"from tests.torchrun import main; main({command})"
    if fresh or not CAN_FORK:
        code = f"import torch.distributed.run; torch.distributed.run.main({command})"
    return Program(folder, number, code, ("env",) if fresh else (), env=env or {})


def run_ranks(folder: Path, n: int, *arguments: str, code: int = 0, **options) -> Program:
    """Run a program as n ranks to its end, which must come with that exit code."""
    job = start_ranks(folder, n, *arguments, **options)
    try:
        assert job.process.wait(NET_S) == code, f"{job.out}\n{job.err}"
        assert not job.living(), f"processes are left:\n{job.err}"
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it did not end:\n{job.out}\n{job.err}") from None
    finally:
        job.end()
    return job


def write_tiny_run(folder: Path, name: str, params: dict, **given) -> str:
    """Write the settings of a run in fp32 on the CPU, and return the file's name.

    Names in lower case go into custom_params.
    """
    params = params | {key: value for key, value in given.items() if key.islower()}
    values = {"TOKENIZER": "char", "CUSTOM_MODE": True, "DEVICE": "cpu", "PRECISION": "fp32"}
    values |= {"COMPILE": False, "sampling_params": {"max_new_tokens": 4}}
    values |= {key: value for key, value in given.items() if key.isupper()}
    lines = [f"{key} = {value!r}\n" for key, value in (values | {"custom_params": params}).items()]
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return name


def metrics(run: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
