"""docs/scaling.md's commands: torchrun knows them, and the SLURM script saves and comes back."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.run import get_args_parser

from tests.conftest import REPOSITORY

DOCS = ["docs/scaling.md", "docs/scaling.zh-CN.md"]


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def fences(text: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_commands(text: str) -> list[list[str]]:
    lines = "\n".join(fences(text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_both_languages_have_the_same_commands_and_sections():
    english, chinese = map(read, DOCS)
    assert fences(english) == fences(chinese) and len(fences(english)) == 5
    assert english.count("\n## ") == chinese.count("\n## ")
    assert english.count("\n|") == chinese.count("\n|")
    assert english.count("\n- ") == chinese.count("\n- ")


def test_torchrun_knows_every_option_of_its_commands():
    commands = [
        command[command.index("torchrun") + 1 :]
        for command in shell_commands(read(DOCS[0]))
        if "torchrun" in command
    ]
    assert len(commands) == 3
    for command in commands:
        asked = get_args_parser().parse_args([part for part in command if part != "&"])
        assert asked.nproc_per_node == "8"
        assert asked.training_script == "main.py"


@pytest.mark.skipif(sys.platform == "win32", reason="SLURM's scripts are bash")
@pytest.mark.parametrize("in_time", [True, False])
def test_the_slurm_script_saves_and_comes_back_when_its_time_is_over(tmp_path, in_time):
    """The script itself, with SLURM's commands and torchrun replaced by ones that note calls."""
    (script,) = (block for block in fences(read(DOCS[0])) if block.startswith("#!/bin/bash"))
    log, pid = tmp_path / "log", tmp_path / "pid"
    ending = "exit 0" if in_time else "while :; do sleep 0.05; done"
    programs = {
        "srun": 'while [ "$1" != torchrun ]; do shift; done\nexec "$@"',
        "torchrun": f"trap 'echo signalled >> {log}; sleep 0.5; echo saved >> {log}; exit 1' TERM\n"
        f'echo "$@" >> {log}\necho $$ > {pid}.new\nmv {pid}.new {pid}\n{ending}',
        "scancel": f'echo "scancel $*" >> {log}\nkill -TERM "$(cat {pid})"',
        "scontrol": f'if [ "$1" = show ]; then printf "a17\\na18\\n"; else echo "$*" >> {log}; fi',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script, encoding="utf-8")
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a[17-18]"}
    job = subprocess.Popen(
        [shutil.which("bash"), str(tmp_path / "job.sh")],
        env=os.environ | slurm | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
    )
    try:
        while job.poll() is None and not pid.exists():
            time.sleep(0.01)
        if not in_time:
            job.send_signal(signal.SIGTERM)
        code = job.wait(timeout=30)
    finally:
        job.kill()
    started, *rest = log.read_text(encoding="utf-8").splitlines()
    assert "--nnodes 2 --nproc-per-node 8" in started and "--rdzv-endpoint a17:29500" in started
    if in_time:
        assert (code, rest) == (0, [])
    else:
        assert rest == ["scancel --signal=TERM 77.0", "signalled", "saved", "requeue 77"]
