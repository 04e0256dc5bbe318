"""The calculator of benchmarks/scaling.py counts right; docs/scaling.md shows what it prints.

Its other commands are torchrun's, and a SLURM script that saves and comes back.
"""

import functools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from torch.distributed.run import get_args_parser

import benchmarks.report
from benchmarks import scaling
from benchmarks.scaling import (
    ASSUMED,
    FP32,
    PARALLEL,
    RANKS,
    Activations,
    Case,
    Network,
    Pieces,
    Plan,
    count,
    efficiency,
    make_pieces,
    make_plan,
    measure_few_layers,
    networks,
    step_seconds,
    three_digits,
)
from distributed.parallel import Parallel
from distributed.sharding import build_in_parts, summing_up
from engine.memory import estimate_memory
from engine.precision import Precision
from model import GPTConfig, GPTModel
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")
BF16 = Precision("bf16", "for tests", "cpu")
DOCS = ["docs/scaling.md", "docs/scaling.zh-CN.md"]
FILE = REPOSITORY / "benchmarks" / "results" / "scaling-cpu.json"
SHAPE = {"vocab_size": 70, "context_length": 32, "emb_dim": 48, "n_heads": 4, "n_layers": 5}
SMALL = {
    "gpt2": GPTConfig(**SHAPE),
    "llama": GPTConfig(**SHAPE, architecture="llama", tie_embeddings=False),
}
H100 = scaling.published_h100()
FAST, SLOW = networks()


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def fences(text: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@functools.cache
def kept_by(architecture: str) -> Activations:
    return measure_few_layers(SMALL[architecture], CPU)


def small_case(architecture: str = "gpt2", n_windows: int = 8) -> Case:
    return Case("small", SMALL[architecture], n_windows, 0.4, "nobody", kept_by(architecture))


@pytest.fixture(scope="module")
def models():
    return {case.name: case for case in scaling.read_results(FILE)[1]}


# ------------------------------------------------------------------------------------- the docs


@pytest.mark.slow
def test_the_tables_are_what_the_calculator_prints(models):
    english, chinese = map(read, DOCS)
    tables = scaling.tables(list(models.values()), H100, networks())
    for header, *lines in tables:
        assert "\n".join([header, *lines]) + "\n\n" in english
        assert "\n".join(lines) + "\n\n" in chinese


@pytest.mark.parametrize("name", DOCS)
def test_the_figures_between_the_tables_are_the_calculators(name, models):
    text, large = read(name), models["7B"]
    plan, _ = make_plan(large, "fsdp", 16, H100.memory)
    recomputed, _ = make_plan(large, "fsdp", 16, H100.memory, recompute=True)
    of_64 = make_pieces(make_plan(large, "fsdp", 64, H100.memory)[0], H100, FAST)
    tokens = large.n_windows * large.config.context_length / 64 / step_seconds(of_64)
    figures = (
        three_digits(step_seconds(make_pieces(plan, H100, SLOW))),
        three_digits(step_seconds(make_pieces(recomputed, H100, SLOW))),
        str(recomputed.micro_batch),
        f"{tokens:,.0f}",
        f"{make_pieces(plan._replace(ranks=1024), H100, FAST).agree * 1000:.0f}",
        f"{12 * count(large.config).parameters / 1e9:.0f} GB",
    )
    spaced = re.sub("[(（]", " ", text)
    assert [figure for figure in figures if f" {figure}" not in spaced] == []
    for case in models.values():
        assert f"| {case.name} | {case.published_mfu:.0%} |" in text
    assert (ASSUMED.reserved, ASSUMED.overlap, ASSUMED.once_bytes) == (4e9, 0.9, 40)
    assert (ASSUMED.launched_s, ASSUMED.agree_hop_s) == pytest.approx((90 * 5e-6, 30e-6))
    assert [n.between for n in networks()] == pytest.approx([320e9, 10e9])
    assert all(n.inside == pytest.approx(360e9) for n in networks())
    assert (FAST.inside_hop_s, FAST.between_hop_s) == (2e-6, 5e-6)


def test_the_calculators_commands_are_understood(capsys):
    text = read(DOCS[0])
    commands = re.findall(r"^python -m benchmarks\.scaling(.*)$", text, re.MULTILINE)
    assert "" in commands and " --measure" in commands
    given = ["--recompute", "--inside", "370", "--between", "340"]
    assert all(option in text for option in ("--inside 370", "--between 340", given[0]))
    scaling.main([*given, "--device-results", str(FILE)])
    printed = capsys.readouterr().out
    assert "inside=370000000000.0, between=340000000000.0" in printed
    assert "measured on" in printed and "H100" not in printed
    assert re.search(r"\| 512 \| \d+\* \|", printed)
    assert "100 Gb/s" not in printed


# ------------------------------------------------------------------------------------- torchrun


def test_torchrun_knows_every_option_of_its_commands():
    lines = "\n".join(fences(read(DOCS[0]))).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    commands = [line[line.index("torchrun") + 1 :] for line in words if "torchrun" in line]
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
        "torchrun": f"trap 'echo signalled >> {log}; sleep 0.1; echo saved >> {log}; exit 1' TERM\n"
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
        code = job.wait(timeout=300)
    finally:
        job.kill()
    started, *rest = log.read_text(encoding="utf-8").splitlines()
    assert "--nnodes 2 --nproc-per-node 8" in started and "--rdzv-endpoint a17:29500" in started
    if in_time:
        assert (code, rest) == (0, [])
    else:
        assert rest == ["scancel --signal=TERM 77.0", "signalled", "saved", "requeue 77"]


# ------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("architecture", SMALL)
def test_parameters_and_work_are_those_of_the_model(architecture):
    config = SMALL[architecture]
    counts, model = count(config), GPTModel(config)
    assert counts.parameters == model.count_parameters() == 5 * counts.block + counts.root
    assert counts.flop == model.flop_per_token()
    assert 5 * counts.block_flop + counts.head_flop == pytest.approx(counts.flop)
    linear = [layer for layer in model.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    assert 5 * counts.block == sum(p.numel() for layer in linear for p in layer.parameters())
    assert counts.head_flop == 6 * 70 * 48


@pytest.mark.parametrize(("architecture", "recomputes"), [("gpt2", False), ("llama", True)])
def test_ddp_takes_what_the_trainer_itself_estimates(architecture, recomputes):
    plan = Plan(small_case(architecture), "ddp", 2, 4, recomputes)
    model = GPTModel(plan.case.config)
    model.activation_checkpointing = recomputes
    expected = estimate_memory(model, n_tokens=32, n_windows=4, precision=BF16, device=CPU)
    found, expected = asdict(plan.memory()), asdict(expected)
    if recomputes:  # embeddings and the last norm aren't a part of the one block
        kept = plan.case.kept
        expected["window"] += (kept.window - kept.window_block) * 4 // 5
    for name in ("weights", "gradients", "optimizer", "activations", "window"):
        assert found[name] == pytest.approx(expected[name], rel=0.01), name
    assert found["best_weights"] == 0


def test_fsdp_divides_what_lasts_and_keeps_gradients_whole_between_micro_steps():
    case = small_case(n_windows=64)
    counts = count(case.config)

    def sizes(ranks: int, micro_batch: int) -> dict:
        return asdict(Plan(case, "fsdp", ranks, micro_batch, False).memory())

    two, four = sizes(2, 32), sizes(4, 16)
    quarter = counts.parameters // 4
    assert two["weights"] - four["weights"] == pytest.approx(FP32 * quarter, abs=8)
    assert two["gradients"] - four["gradients"] == pytest.approx(FP32 * quarter, abs=8)
    assert two["optimizer"] == 2 * four["optimizer"] == 4 * counts.parameters
    gathered = 2 * 2 * counts.block + FP32 * counts.root
    assert two["weights"] == pytest.approx(FP32 * counts.parameters / 2 + gathered)
    assert sizes(2, 16)["gradients"] - two["gradients"] == FP32 * 5 * counts.block
    assert two["activations"] == 0


class NotedMessages:
    """Stands in for FSDP2's all-gather or reduce-scatter, and notes how much each moves."""

    def __init__(self) -> None:
        self.sizes = []

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, *_, **__):
        self.sizes.append(max(output_tensor.nbytes, input_tensor.nbytes))


def test_fsdp_sends_the_messages_that_the_formula_counts(request):
    from torch.distributed.fsdp import FSDPModule
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # of two processes this one is the first, and nobody the other
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    request.addfinalizer(torch.distributed.destroy_process_group)
    parallel = Parallel(rank=0, world=2, store=torch.distributed.HashStore())
    parallel.kind, config = "fsdp", SMALL["gpt2"]
    model = build_in_parts(lambda: GPTModel(config), parallel, BF16, CPU)
    gathers, reduces = NotedMessages(), NotedMessages()
    ids = torch.zeros(1, 32, dtype=torch.long)

    def take_step(micro_steps: int) -> None:
        for number in range(micro_steps):
            now = number == micro_steps - 1
            with BF16.autocast(), summing_up(model, parallel, now=now):
                loss = model(ids, ids, 32)
                with torch.autocast("cpu", enabled=False):
                    loss.backward()

    take_step(1)  # the first pass of all has its own order
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gathers)
            module.set_custom_reduce_scatter(reduces)
    take_step(3)
    counts = count(config)
    in_bf16, in_fp32, root = 2 * counts.block, FP32 * counts.block, FP32 * counts.root
    assert sorted(gathers.sizes) == sorted(3 * (10 * [in_bf16] + [root]))
    assert reduces.sizes == 5 * [in_fp32] + [root]


def test_activations_grow_by_the_same_with_every_block_and_the_file_has_them(models):
    fresh = measure_few_layers(models["124M"].config, CPU)
    assert fresh == pytest.approx(models["124M"].kept, rel=0.02)


# ------------------------------------------------------------------------------------- plans


def test_as_many_windows_as_fit_are_taken_and_recomputing_is_the_last_resort():
    case = small_case()
    all_at_once = Plan(case, "ddp", 2, 4, False)
    one, one_recomputed = (Plan(case, "ddp", 2, 1, again) for again in (False, True))
    assert make_plan(case, "ddp", 2, all_at_once.total) == (all_at_once, True)
    halved = all_at_once._replace(micro_batch=2)
    assert make_plan(case, "ddp", 2, all_at_once.total - 1) == (halved, True)
    assert make_plan(case, "ddp", 2, one.total) == (one, True)
    plan, fits = make_plan(case, "ddp", 2, one.total - 1)
    assert fits and plan.recomputes
    assert make_plan(case, "ddp", 2, one_recomputed.total - 1) == (one_recomputed, False)
    assert make_plan(case, "ddp", 2, math.inf, recompute=True)[0].recomputes


# ------------------------------------------------------------------------------------- time


def test_messages_take_their_bytes_and_their_hops():
    network = Network("test", 100e9, 10e9, inside_hop_s=1e-6, between_hop_s=10e-6)
    assert network.all_reduce_s(1e9, 1) == network.gather_s(1e9, 1) == 0
    # 8 in a machine: a ring has 7 hops, a tree 3
    assert network.gather_s(1e9, 8) == pytest.approx(7 / 8 * 1e9 / 100e9 + 7e-6)
    assert network.all_reduce_s(1e9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / 100e9 + 2 * 3e-6)
    # 32 in 4 machines: 27 hops within and 4 between, or 3 and 2
    assert network.gather_s(1e9, 32) == pytest.approx(31 / 32 * 1e9 / 10e9 + 27e-6 + 40e-6)
    assert network.all_reduce_s(0, 32) == pytest.approx(2 * (3e-6 + 20e-6))
    assert network.all_reduce_s(0, 2) == pytest.approx(2 * 1e-6)


def test_ddp_messages_are_gradients_once_and_fsdp_gathers_twice_a_micro_step():
    case, network = small_case(), Network("no waits", 1e9, 1e9, inside_hop_s=0, between_hop_s=0)
    device = H100._replace(
        flop_per_second={"small": math.inf}, once_s_per_parameter=0.0, launched_s=0.0
    )
    counts = count(case.config)

    def seconds(parallel: str, micro_batch: int) -> float:
        pieces = make_pieces(Plan(case, parallel, 2, micro_batch, False), device, network)
        return step_seconds(pieces._replace(agree=0.0))

    assert seconds("ddp", 1) == seconds("ddp", 4) == pytest.approx(4e-9 * counts.parameters)
    sent = 4 * counts.parameters / 2  # reduce-scatter moves (W - 1) / W
    gathered = (2 * 2 * 5 * counts.block + 4 * counts.root) / 2
    assert seconds("fsdp", 4) == pytest.approx(1e-9 * (sent + gathered))
    assert seconds("fsdp", 1) == pytest.approx(1e-9 * (sent + 4 * gathered))


def simulated_seconds(p: Pieces) -> float:
    """A step played event by event, as DDP and FSDP2 issue them, on the queues of a host, a GPU and
    its network. The second of two, for the host may be ahead of the GPU."""
    free_at = {"host": 0.0, "compute": 0.0, "network": 0.0}

    def add(stream: str, seconds: float, *after: float) -> float:
        free_at[stream] = max(free_at[stream], *after, 0.0) + seconds
        return free_at[stream]

    def go_through_blocks(computing: float, launch: float, now: float, reduces: bool) -> float:
        gathered, under_way = add("network", p.gather, now), 0.0
        for number in range(p.n_layers):
            begins_at = max(now, gathered, add("host", launch))
            if number < p.n_layers - 1:  # weights are fetched one block ahead
                gathered = add("network", p.gather, begins_at)
                under_way += p.gather
            now = add("compute", computing + (1 - ASSUMED.overlap) * under_way, begins_at)
            under_way = p.reduce if reduces else 0.0
            if reduces:
                add("network", p.reduce, now)
        return now

    now, ends = 0.0, []
    for _ in range(2):
        for number in range(p.accumulation):
            gathered = add("network", p.gather_root, now)
            now = go_through_blocks(p.forward, p.launch, gathered, False)
            now = add("compute", p.head, now)
            is_last = number == p.accumulation - 1
            now = go_through_blocks(p.backward, p.launch_backward, now, is_last)
        now = add("compute", p.once, add("network", p.reduce_root, now))
        add("host", p.agree)
        ends.append(now)
    return ends[1] - ends[0]


def test_formula_and_simulation_agree_in_the_tables_rows_and_whatever_the_pieces_are(models):
    kinds = [(r, p, n) for r in RANKS for p in PARALLEL for n in networks()]
    cases = [(case, *kind) for case in models.values() for kind in kinds]
    assert len(cases) > 70
    for case, ranks, parallel, network in cases[::7]:  # some of each, those that don't fit too
        if case.n_windows % ranks:
            continue
        plan, _ = make_plan(case, parallel, ranks, H100.memory)
        pieces = make_pieces(plan, H100, network)
        assert step_seconds(pieces) == pytest.approx(simulated_seconds(pieces), rel=0.02), plan
    draw = random.Random(1)
    for _ in range(100):
        times = [10 ** draw.uniform(-4, -1) for _ in range(11)]
        pieces = Pieces(draw.randint(4, 60), draw.randint(1, 5), *times)
        assert step_seconds(pieces) == pytest.approx(simulated_seconds(pieces), rel=0.2)


def test_a_step_alone_is_its_work_and_without_a_network_nothing_else(models):
    case = models["124M"]
    plan, _ = make_plan(case, "ddp", 1, H100.memory)
    pieces = make_pieces(plan, H100, FAST)
    work = 2**19 * count(case.config).flop / H100.flop_per_second["124M"]
    assert step_seconds(pieces) == pytest.approx(work + pieces.once)
    assert efficiency(plan, H100, step_seconds(pieces)) == pytest.approx(1)
    # recomputing takes a third more
    plan, free = Plan(models["7B"], "fsdp", 1, 1, False), Network("", math.inf, math.inf, 0, 0)
    once, again = (make_pieces(p, H100, free) for p in (plan, plan._replace(recomputes=True)))
    assert again.forward + again.backward == pytest.approx(4 / 3 * (once.forward + once.backward))
    # a GPU with little to do waits for its host
    plan, _ = make_plan(case, "ddp", 256, H100.memory)
    launching, agreeing = 12 * 90 * 5e-6, 2 * 255 * 30e-6
    assert step_seconds(make_pieces(plan, H100, FAST)) == pytest.approx(launching + agreeing)


# ------------------------------------------------------------------------------------- measuring


@pytest.fixture
def small_cases(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "cases", lambda: [small_case()._replace(kept=None)])
    monkeypatch.setattr(scaling, "SIZES", {"cpu": {"small": (4, 2, 16)}})
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "pick_device", lambda _: CPU)
    return tmp_path


def test_what_is_measured_takes_the_place_of_what_is_published(small_cases, monkeypatch, capsys):
    def timed(case, *_):
        assert case.config == replace(SMALL["gpt2"], n_layers=2, context_length=16)
        assert case.batch_size == 4
        return {"flop_per_second": 5e9}

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(scaling.train, "measure", fail)
    with pytest.raises(SystemExit, match="nothing could be measured"):
        scaling.main(["--measure"])
    assert "small: there is too little memory here" in capsys.readouterr().out
    assert not list(small_cases.iterdir())
    monkeypatch.setattr(scaling.train, "measure", timed)
    scaling.main(["--measure"])
    (file,) = small_cases.glob("scaling-cpu-*.json")  # the processor's own
    written = json.loads(file.read_text(encoding="utf-8"))
    assert Activations(**written["activations"]["small"]) == small_case().kept
    device, (case,) = scaling.read_results(file)
    assert (device.flop_per_second, device.launched_s) == ({"small": 5e9}, 0)
    assert device.memory == written["memory"] and case == small_case()
    capsys.readouterr()
    scaling.main(["--device-results", str(file)])
    printed = capsys.readouterr().out
    assert "measured on" in printed and "published" not in printed
    assert "| small | 5 x 48 |" in printed


def test_a_measured_gpu_keeps_something_for_itself_and_its_host_launches(tmp_path):
    results, path = json.loads(FILE.read_text(encoding="utf-8")), tmp_path / "results.json"
    results["machine"] |= {"device": "cuda", "name": "G"}
    for memory, expected in ((9e9, 5e9), (None, math.inf)):
        path.write_text(json.dumps(results | {"memory": memory}), encoding="utf-8")
        device, _ = scaling.read_results(path)
        assert (device.name, device.memory) == ("G", expected)
        assert device.launched_s == ASSUMED.launched_s


def test_a_file_that_has_no_results_and_a_network_without_a_speed_are_refused(tmp_path, capsys):
    path = tmp_path / "results.json"
    for content in (None, "{", "[]", "{}", '{"machine": {"device": "cpu"}}'):
        if content is not None:
            path.write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit) as stopped:
            scaling.main(["--device-results", str(path)])
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert "results.json can't be read" in message
        assert "python -m benchmarks.scaling --measure" in message
    for speed in ("0", "-1", "nan"):
        with pytest.raises(SystemExit):
            scaling.main(["--inside", speed])
        assert "above 0" in capsys.readouterr().err
