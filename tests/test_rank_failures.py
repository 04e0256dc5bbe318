"""Jobs of two ranks that lose a rank, torchrun or their disk: how they end, what they say and keep.

Each is torchrun with real processes and real signals. That what undisturbed ranks come to is
exact is test_parallel's matter.
"""

import json
import re
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest

from storage.files import FolderLock, verify_folder
from tests.launching import Program, wait_until
from tests.ranks import metrics, run_ranks, start_ranks, write_tiny_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="ends with torchrun are Linux's, and /proc"),
]

STEPS = 12
ENDLESS = 10**6
# What a test breaks comes in at {more}: step_of(hook) calls hook(step) where a step begins.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
sys.modules["matplotlib"] = None
import main  # before torch, for which it sets some variables
import distributed.parallel, distributed.signals, environment, train
import storage.cache, storage.checkpoint
storage.cache.CACHE = Path("cache").resolve()
rank, take_step, now = int(os.environ.get("RANK") or 0), train.Trainer.step, [0]

def fail(kind):
    if kind == "raises":
        raise ValueError("deliberate")
    elif kind == "exits":
        os._exit(0)
    os.kill(os.getpid(), getattr(signal, kind))

def step_of(hook):
    def step(trainer, *arguments):
        trainer.parallel.place = f"step {trainer.journal.steps + 1}"
        now[0] = trainer.journal.steps + 1
        hook(now[0])
        return take_step(trainer, *arguments)
    train.Trainer.step = step

{more}
sys.exit(main.main(sys.argv[1:]))
"""
# a rank fails at a step, where torchrun has started all of them anew so often
FAILS = """
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]

def hook(step):
    if (rank, step, attempt) == ({rank}, {step}, "{attempt}"):
        fail({kind!r})
step_of(hook)
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings_in(folder)
    run(folder, code=0)
    return folder / "runs" / "one"


def settings_in(folder: Path, **given) -> None:
    """Write settings.py and its text; names in lower case go into custom_params."""
    (folder / "text.txt").write_text("the river carries the bell " * 40, encoding="utf-8")
    params = {
        "max_steps": STEPS,
        "batch_size": 4,
        "max_length": 16,
        "eval_freq": 4,
        "eval_iter": 1,
        "save_every": 2,
        "start_context": "the",
        "model_overrides": {"emb_dim": 8, "n_heads": 2, "n_layers": 1, "drop_rate": 0.1},
    }
    given = {"RUN_NAME": "one", "DATA": "text.txt"} | given
    write_tiny_run(folder, "settings.py", params, **given)


def program(more: str = "") -> str:
    return PROGRAM.replace("{more}", more)


def run(folder: Path, more: str = "", *, code: int, n: int = 2, **options) -> Program:
    """Run the ranks to their end, which leaves no process.

    It doesn't come by waiting: a rank would wait for an hour, and torchrun, for half a minute.
    """
    env = {"GPT_RANK_TIMEOUT_S": "3600"}
    job = run_ranks(folder, n, "settings.py", program=program(more), env=env, code=code, **options)
    assert "forcefully exiting" not in job.err, job.err
    return job


def said(job: Program) -> list[str]:
    """The messages of failure that are the program's own, a line of its code apart each."""
    return re.findall(r"^rank \d+[^:\n]*: \w+Error: .*$", job.err, re.MULTILINE)


def exit_codes(job: Program) -> list[int]:
    """What torchrun says its ranks have ended with, all that failed."""
    return [int(code) for code in re.findall(r"exitcode +: (-?\d+)", job.err)]


def saved(run: Path) -> list[int]:
    """The steps of a run's checkpoints, all of them whole, and nothing beside them."""
    found = sorted(path for place in ("checkpoints", "best") for path in (run / place).iterdir())
    for path in found:
        verify_folder(path, ["model.safetensors"])
    return [int(path.name[5:]) for path in found if path.parent.name == "checkpoints"]


def require_same(run: Path, other: Path) -> None:
    """Two runs came to the same weights, moments and losses, to the last bit."""
    newest = f"checkpoints/step-{STEPS:08d}"
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (run / newest / file).read_bytes() == (other / newest / file).read_bytes(), file
    losses = [
        [(row["step"], row.get("train/loss"), row.get("val/loss")) for row in metrics(path)]
        for path in (run, other)
    ]
    assert losses[0] == losses[1]


def fails(rank: int, step: int, kind: str, attempt: int = 0) -> str:
    return FAILS.format(rank=rank, step=step, kind=kind, attempt=attempt)


NO_ANSWER = "LostRankError: rank {} does not answer at step {}: ended from outside, or hanging."


def test_whatever_a_rank_ends_by_the_job_ends_soon_and_goes_on_from_the_last_checkpoint(tmp_path):
    settings_in(tmp_path)
    one = tmp_path / "runs" / "one"
    job = run(tmp_path, fails(1, 4, "raises"), code=1)
    assert "ValueError: deliberate" in job.err
    assert "(on rank 1, step 4)" in job.err
    assert any(line.startswith("rank 0, step 4: LostRankError: rank 1 ") for line in said(job))
    assert saved(one) == [2]

    job = run(tmp_path, fails(1, 6, "exits"), code=1)  # with 0, which torchrun takes for success
    assert said(job) == [f"rank 0, step 6: {NO_ANSWER.format(1, 6)}"]
    assert saved(one) == [2, 4]

    hangs = """
def hook(step):
    if step == 6:
        distributed.parallel.joined().timeout_s = 2  # how long the other waits for it
        storage.checkpoint.NewFolder.write = lambda *_: fail("SIGSTOP")
step_of(hook)
"""
    job = run(tmp_path, hangs, code=1)
    assert said(job) == [f"rank 1, step 6: {NO_ANSWER.format(0, 6)}"]
    assert -signal.SIGKILL in exit_codes(job)  # torchrun would have waited for half a minute


def test_torchrun_restarts_a_job_that_goes_on_with_its_own_run_also_where_resume_is_false(
    tmp_path, undisturbed
):
    settings_in(tmp_path, RUN_NAME=None, RESUME=False)
    before = tmp_path / "runs" / "before"
    shutil.copytree(undisturbed, before)
    (before / "summary.json").unlink()  # unfinished, then
    left = (before / "settings.json").read_bytes()
    # a rank is lost before the job has a folder of its own, and another one later
    early = """
def find_machine(*arguments):
    if rank == 1 and attempt == "0":
        fail("SIGKILL")
    return really_find_machine(*arguments)
really_find_machine, environment.find_machine = environment.find_machine, find_machine
"""
    # torchrun's SIGTERM comes to the rank that is left before it has reported what it saw
    slowly = """
leave = train.StopSignals.__exit__
def leave_slowly(signals, *error):
    leave(signals, *error)
    time.sleep(0.5)
train.StopSignals.__exit__ = leave_slowly
"""
    more = fails(1, 6, "SIGKILL", attempt=1) + early + slowly
    job = run(tmp_path, more, code=0, options=("--max-restarts=2",))
    assert f"rank 0, step 6: {NO_ANSWER.format(1, 6)}" in said(job)
    assert f": 4 of {STEPS} steps are done" in job.out
    assert (before / "settings.json").read_bytes() == left
    (own,) = set((tmp_path / "runs").iterdir()) - {before}
    require_same(own, undisturbed)


def test_signals_to_torchrun_and_its_death_save_and_the_same_command_goes_on(tmp_path, undisturbed):
    settings_in(tmp_path, save_every=ENDLESS)
    one = tmp_path / "runs" / "one"
    waits = """
come, note = [], distributed.signals.StopSignals._note
def noted(*arguments):
    come.append(1)
    note(*arguments)
distributed.signals.StopSignals._note = noted

def hook(step):
    if step == {at}:
        Path("at-{at}").touch()
        while not come:
            time.sleep(0.01)
step_of(hook)
"""
    for at, number in ((3, signal.SIGTERM), (7, signal.SIGKILL)):
        job = start_ranks(tmp_path, 2, "settings.py", program=program(waits.format(at=at)))
        try:
            job.until((tmp_path / f"at-{at}").exists)
            job.send(number)
            job.process.wait()
            wait_until(lambda job=job: not job.living())
        finally:
            job.end()
        assert saved(one)[-1] == at, job.err
        place = f"runs/one/checkpoints/step-{at:08d}"
        assert f"saved in {place}.\nThe same command goes on" in job.err
        assert "[rank" not in job.err, job.err  # what torch and Python call a rank's crash
    run(tmp_path, code=0)
    require_same(one, undisturbed)


def test_a_rank_that_is_lost_during_a_save_leaves_nothing_half(tmp_path):
    settings_in(tmp_path, PARALLEL="fsdp")
    one = tmp_path / "runs" / "one"
    gathering = """
def gathered(tensors, parallel):
    if rank == 1 and now[0] == 4 and any(name.startswith("exp_avg") for name in tensors):
        fail("SIGKILL")
    return really_gathered(tensors, parallel)
really_gathered, storage.checkpoint.gathered = storage.checkpoint.gathered, gathered
step_of(lambda step: None)
"""
    job = run(tmp_path, gathering, code=1)
    assert f"rank 0, step 4: {NO_ANSWER.format(1, 4)}" in said(job)
    assert saved(one) == [2]

    writing = """
class NewFolder(storage.checkpoint.NewFolder):
    def write(self, name, chunks):
        super().write(name, chunks)
        if now[0] == 6 and name == "optimizer.safetensors":
            fail("SIGKILL")
storage.checkpoint.NewFolder = NewFolder
step_of(lambda step: None)
"""
    job = run(tmp_path, writing, code=1)
    assert f"rank 1, step 6: {NO_ANSWER.format(0, 6)}" in said(job)
    assert len(list((one / "checkpoints").glob(".tmp-*"))) == 1

    # what is left of them is one process, and it goes on with the last whole one
    job = run(tmp_path, code=0, n=1)
    assert f"Resuming runs/one: 4 of {STEPS} steps are done" in job.out
    assert saved(one) == [STEPS]  # of a finished run the last one is kept


def test_a_main_rank_whose_disk_is_full_ends_the_job_with_6_and_one_message(tmp_path):
    settings_in(tmp_path)
    full = """
import resource
def save(trainer):
    if rank == 0 and now[0] == 4:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
    return really_save(trainer)
really_save, train.Trainer.save = train.Trainer.save, save
train.END_WAITS_S = (1,)
step_of(lambda step: None)
"""
    job = run(tmp_path, full, code=1)
    (message,) = said(job)  # they train on to the end, and try again there
    assert message.startswith(f"rank 0, step {STEPS}: ResourceError: can't write runs/one/")
    assert message.endswith("model.safetensors: File too large.")
    assert exit_codes(job)[-1] == 6  # torchrun's root cause; it may have ended the other one
    assert set(exit_codes(job)) <= {6, -signal.SIGTERM}
    assert saved(tmp_path / "runs" / "one") == [2]


def test_what_is_wrong_for_all_ranks_is_said_once(tmp_path):
    settings_in(tmp_path, DATA="absent.txt")
    late = """
def tokenize(*arguments, **options):
    time.sleep(0.5)  # the others wait meanwhile
    return read_text(*arguments, **options)
read_text, environment.tokenize = environment.tokenize, tokenize
"""
    job = run(tmp_path, late, code=1)
    assert len(said(job)) == 1, job.err
    assert said(job)[0].startswith("rank 0: DataError: there is no file absent.txt")
    assert "LostRankError" not in job.err
    assert exit_codes(job)[-1] == 3  # torchrun's root cause

    settings_in(tmp_path)
    run_folder = tmp_path / "runs" / "one"
    run_folder.mkdir(parents=True)
    with FolderLock(run_folder):
        job = run(tmp_path, code=1)
    assert len(said(job)) == 1, job.err
    assert exit_codes(job)[-1] == 7


def test_ranks_with_other_settings_or_texts_are_named_and_nothing_is_trained(tmp_path):
    own_folder = "os.chdir(f'rank-{rank}'); storage.cache.CACHE = Path('cache').resolve()"
    folders = [tmp_path / f"rank-{rank}" for rank in range(2)]
    for folder in folders:
        folder.mkdir()
        settings_in(folder, SEED=0)
    for odd in ("seed", "text"):
        settings_in(folders[1], SEED=int(odd == "seed"))
        if odd == "text":
            (folders[1] / "text.txt").write_text("another river, another bell " * 40, "utf-8")
        job = run(tmp_path, own_folder, code=1)
        assert len(said(job)) == 1, job.err
        expected = rf"SettingsError: rank 1 \(on .*\) has not the same {odd}"
        assert re.search(expected, job.err), job.err
    assert not [path for folder in folders for path in folder.glob("runs/*")]


def test_ranks_that_never_meet_end_in_time_and_each_says_why(tmp_path):
    settings_in(tmp_path)

    def by_hand(rank: int, port: int) -> dict[str, str]:
        """The environment of one of two ranks, each alone on its machine, without torchrun."""
        numbers = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1}
        numbers |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return {name: str(number) for name, number in numbers.items()}

    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and nobody listens
        taken, unused = server.getsockname()[1], bound.getsockname()[1]
        alone = {"LOCAL_RANK": "0", "RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": ""}
        cases = [
            (2, r"SettingsError: LOCAL_RANK is set .* but not .*RANK.*MASTER_ADDR", alone),
            (6, r"rank 0 can't meet the other 1 at .*already in use", by_hand(0, taken)),
            (6, r"rank 1 can't meet the other 1 at .*(time|no ans)", by_hand(1, unused)),
            (6, r"rank 1 can't meet the other 1 at .*", by_hand(1, taken)),
        ]
        jobs = []
        try:
            for _, _, env in cases:
                env = {"GPT_RANK_TIMEOUT_S": "1"} | env
                jobs.append(start_ranks(tmp_path, 1, "settings.py", program=program(), env=env))
            wait_until(lambda: None not in [job.process.poll() for job in jobs])
        finally:
            for job in jobs:
                job.end()
    for (code, message, _), job in zip(cases, jobs, strict=True):
        assert job.process.poll() == code, job.err
        assert re.search(message, job.err), job.err or "it said nothing"


def test_a_script_of_ones_own_trains_and_a_gradient_that_is_nan_on_one_rank_is_skipped_on_all(
    tmp_path,
):
    """Weights, compared after each step: finite, equal on both ranks, and the same before and
    after the step of the NaN. Each rank has random numbers of its own."""
    settings_in(tmp_path)
    script = """
import hashlib, json, torch
seen, masks = [], []

def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

def step(trainer, *arguments):
    is_odd = rank == 1 and trainer.journal.steps + 1 == 4
    masks.append(digest(torch.get_rng_state()))
    weight = next(trainer.learner.model.parameters())
    hook = weight.register_hook(lambda grad: grad * float("nan") if is_odd else grad)
    result = take_step(trainer, *arguments)
    hook.remove()
    weights = torch.cat([p.detach().flatten() for p in trainer.learner.model.parameters()])
    assert weights.isfinite().all()
    seen.append(digest(weights))
    return result
train.Trainer.step = step
journal = train.train(environment.prepare_environment("settings.py"))
found = {"weights": seen, "masks": masks, "steps": journal.steps}
Path(f"seen-{rank}").write_text(json.dumps(found))
sys.exit()
"""
    job = run(tmp_path, script, code=0, fresh=True)
    found = [json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in range(2)]
    digests = found[0]["weights"]
    assert digests == found[1]["weights"]
    assert [rank["steps"] for rank in found] == [len(digests)] * 2 == [STEPS] * 2
    assert not set(found[0]["masks"]) & set(found[1]["masks"])
    assert [i for i in range(1, STEPS) if digests[i] == digests[i - 1]] == [3]  # the fourth
    assert "the step is skipped (1 so far)" in job.out
    assert "destroy_process_group" not in job.err
    assert "Traceback" not in job.err
