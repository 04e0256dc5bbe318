"""The calculator of benchmarks/scaling.py counts right; docs/scaling.md shows what it prints."""

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
import benchmarks.scaling as scaling
from benchmarks.scaling import (
    FP32,
    PARALLEL,
    RANKS,
    Activations,
    Case,
    Model,
    Network,
    Pieces,
    Plan,
    Sizes,
    count,
    efficiency,
    make_pieces,
    make_plan,
    measure_few_layers,
    networks,
    simulated_seconds,
    split_seconds,
    step_seconds,
    three_digits,
)
from engine.memory import estimate_memory
from engine.precision import Precision
from model import GPTConfig, GPTModel
from tests.conftest import REPOSITORY

CPU = torch.device("cpu")
BF16 = Precision("bf16", "for tests", "cpu")
DOCS = ["docs/scaling.md", "docs/scaling.zh-CN.md"]
FILE = REPOSITORY / "benchmarks" / "results" / "scaling-cpu.json"
SMALL = {
    "gpt2": GPTConfig(vocab_size=70, context_length=32, emb_dim=48, n_heads=4, n_layers=5),
    "llama": GPTConfig(
        vocab_size=70,
        context_length=32,
        emb_dim=48,
        n_heads=4,
        n_layers=5,
        architecture="llama",
        tie_embeddings=False,
    ),
}


def read(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def fences(text: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def shell_commands(text: str) -> list[list[str]]:
    lines = "\n".join(fences(text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def results():
    return scaling.read_results(FILE)


@pytest.fixture(scope="module")
def models(results):
    return {model.case.name: model for model in scaling.known_models(results)}


@pytest.fixture(scope="module")
def h100():
    return scaling.published_h100()


@pytest.fixture(scope="module")
def rows(models, h100):
    """(plan, its pieces) of every row and network, those that don't fit too."""
    found = []
    for model in models.values():
        for ranks in (ranks for ranks in RANKS if model.case.n_windows % ranks == 0):
            for parallel in PARALLEL:
                plan, _ = make_plan(model, parallel, ranks, h100.memory)
                found += [(plan, make_pieces(plan, h100, network)) for network in networks()]
    return found


def small_model(architecture: str = "gpt2", n_windows: int = 8) -> Model:
    config = SMALL[architecture]
    case = Case("small", config, n_windows, 0.4, "nobody")
    return Model(case, count(config), measure_few_layers(config, CPU))


# ------------------------------------------------------------------------------------- the docs


@pytest.mark.parametrize("name", DOCS)
def test_the_tables_are_what_the_calculator_prints(name, results, h100):
    text = read(name)
    for number, (header, *lines) in enumerate(scaling.tables(results, h100, networks())):
        assert "\n".join(lines) + "\n\n" in text, f"table {number}"
        if name == DOCS[0]:
            assert f"{header}\n{lines[0]}" in text


@pytest.mark.parametrize("name", DOCS)
def test_the_figures_between_the_tables_are_the_calculators(name, models, h100, results):
    text, (fast, slow) = read(name), networks()
    plan, _ = make_plan(models["7B"], "fsdp", 16, h100.memory)
    recomputed, _ = make_plan(models["7B"], "fsdp", 16, h100.memory, recompute=True)
    large, _ = make_plan(models["7B"], "fsdp", 64, h100.memory)
    tokens = models["7B"].case.n_tokens / 64 / step_seconds(make_pieces(large, h100, fast))
    all_ranks = replace(large, ranks=1024)
    figures = (
        three_digits(step_seconds(make_pieces(plan, h100, slow))),
        three_digits(step_seconds(make_pieces(recomputed, h100, slow))),
        str(recomputed.at_a_time),
        f"{tokens:,.0f}",
        f"{make_pieces(all_ranks, h100, fast).agree * 1000:.0f}",
        f"{12 * models['7B'].counts.parameters / 1e9:.0f} GB",
        results["machine"]["name"],
    )
    spaced = re.sub("[(（]", " ", text)
    assert [figure for figure in figures if f" {figure}" not in spaced] == []
    for model in models.values():
        assert f"| {model.case.name} | {model.case.published_mfu:.0%} |" in text
    assumed = scaling.Assumptions()
    assert (assumed.reserved, assumed.overlap, assumed.once_bytes) == (4e9, 0.9, 40)
    assert (assumed.launched_s, assumed.agree_hop_s) == pytest.approx((90 * 5e-6, 30e-6))
    assert [n.between for n in networks()] == pytest.approx([320e9, 10e9])
    assert all(n.inside == pytest.approx(360e9) for n in networks())
    assert (fast.inside_hop_s, fast.between_hop_s) == (2e-6, 5e-6)


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


def test_the_calculators_commands_are_understood(capsys, results):
    commands = [
        command[3:]
        for command in shell_commands(read(DOCS[0]))
        if command[:3] == ["python", "-m", "benchmarks.scaling"]
    ]
    assert [] in commands and ["--measure"] in commands
    given = ["--recompute", "--inside", "370", "--between", "340"]
    assert all(option in read(DOCS[0]) for option in ("--inside 370", "--between 340", given[0]))
    scaling.main([*given, "--device-results", str(FILE)])
    printed = capsys.readouterr().out
    assert "inside=370000000000.0, between=340000000000.0" in printed
    assert results["machine"]["name"] in printed and "H100" not in printed
    assert re.search(r"\| 512 \| \d+\* \|", printed)
    assert "100 Gb/s" not in printed


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


# ------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize("architecture", SMALL)
def test_parameters_and_work_are_those_of_the_model(architecture):
    config = SMALL[architecture]
    counts, model = count(config), GPTModel(config)
    assert counts.parameters == model.count_parameters()
    assert counts.flop == pytest.approx(model.flop_per_token())
    linear = [layer for layer in model.blocks.modules() if isinstance(layer, torch.nn.Linear)]
    assert 5 * counts.block == sum(p.numel() for layer in linear for p in layer.parameters())
    assert counts.head_flop == 6 * 70 * 48


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("architecture", SMALL)
def test_ddp_takes_what_the_trainer_itself_estimates(architecture, recomputes):
    plan = Plan(small_model(architecture), "ddp", 2, 4, recomputes)
    model = GPTModel(plan.model.case.config)
    model.activation_checkpointing = recomputes
    expected = estimate_memory(model, n_tokens=32, n_windows=4, precision=BF16, device=CPU)
    found, expected = asdict(plan.memory()), asdict(expected)
    if recomputes:  # embeddings and the last norm aren't a part of the one block
        kept = plan.model.kept
        expected["window"] += (kept.window - kept.window_block) * 4 // 5
    for name in ("weights", "gradients", "optimizer", "activations", "window"):
        assert found[name] == pytest.approx(expected[name], rel=0.01), name
    assert found["best_weights"] == 0


def test_fsdp_divides_what_lasts_and_keeps_gradients_whole_between_micro_steps():
    model = small_model(n_windows=64)
    counts = model.counts

    def sizes(ranks: int, at_a_time: int) -> dict:
        return asdict(Plan(model, "fsdp", ranks, at_a_time, False).memory())

    two, four = sizes(2, 32), sizes(4, 16)
    quarter = counts.parameters // 4
    assert two["weights"] - four["weights"] == pytest.approx(FP32 * quarter, abs=8)
    assert two["gradients"] - four["gradients"] == pytest.approx(FP32 * quarter, abs=8)
    assert two["optimizer"] == 2 * four["optimizer"] == 4 * counts.parameters
    gathered = 2 * 2 * counts.block + FP32 * counts.root
    assert two["weights"] == pytest.approx(FP32 * counts.parameters / 2 + gathered)
    assert sizes(2, 16)["gradients"] - two["gradients"] == FP32 * 5 * counts.block
    assert two["activations"] == 0


@pytest.fixture
def two_ranks():
    """A process group of two, of which this process is one and nobody the other."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    torch.distributed.destroy_process_group()


class NotedMessages:
    """Stands in for FSDP2's all-gather or reduce-scatter, and notes how much each moves."""

    def __init__(self) -> None:
        self.sizes = []

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, *_, **__):
        self.sizes.append(max(output_tensor.nbytes, input_tensor.nbytes))


def test_fsdp_sends_the_messages_that_the_formula_counts(two_ranks):
    from torch.distributed.fsdp import FSDPModule

    from distributed.parallel import Parallel
    from distributed.sharding import build_in_parts, summing_up

    store = torch.distributed.HashStore()
    parallel, config = Parallel(rank=0, world=2, store=store), SMALL["gpt2"]
    parallel.kind = "fsdp"
    model = build_in_parts(lambda: GPTModel(config), parallel, BF16, CPU)
    gathers, reduces = NotedMessages(), NotedMessages()
    ids = torch.zeros(1, 32, dtype=torch.long)

    def take_step(micro_steps: int) -> None:
        for number in range(micro_steps):
            with (
                BF16.autocast(),
                summing_up(model, parallel, now=number == micro_steps - 1),
            ):
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


def test_activations_grow_by_the_same_with_every_block_and_the_file_has_them(results):
    case = scaling.cases()[0]
    fresh = measure_few_layers(case.config, CPU)
    assert asdict(fresh) == pytest.approx(results["activations"]["124M"], rel=0.02)


def test_the_published_models_are_of_their_names_sizes(models):
    assert [model.counts.parameters / 1e9 for model in models.values()] == pytest.approx(
        [0.124, 1.557, 6.71], rel=0.01
    )
    assert [model.case.n_tokens for model in models.values()] == [2**19, 2**20, 2**22]


# ------------------------------------------------------------------------------------- plans


def test_as_many_windows_as_fit_are_taken_and_recomputing_is_the_last_resort():
    model = small_model()
    all_at_once = Plan(model, "ddp", 2, 4, False)
    one, one_recomputed = (Plan(model, "ddp", 2, 1, again) for again in (False, True))
    assert make_plan(model, "ddp", 2, all_at_once.total) == (all_at_once, True)
    halved = replace(all_at_once, at_a_time=2)
    assert make_plan(model, "ddp", 2, all_at_once.total - 1) == (halved, True)
    assert make_plan(model, "ddp", 2, one.total) == (one, True)
    plan, fits = make_plan(model, "ddp", 2, one.total - 1)
    assert fits and plan.recomputes
    assert make_plan(model, "ddp", 2, one_recomputed.total - 1) == (one_recomputed, False)
    assert make_plan(model, "ddp", 2, math.inf, recompute=True)[0].recomputes


@pytest.mark.parametrize("ranks", [3, 16])
def test_ranks_that_do_not_divide_a_step_are_refused(ranks):
    with pytest.raises(ValueError, match=f"8 windows can't be divided over {ranks} ranks"):
        make_plan(small_model(), "ddp", ranks, math.inf)


def test_7b_needs_fsdp_and_four_gpus(models, h100):
    fitting = {
        (parallel, ranks)
        for parallel in PARALLEL
        for ranks in RANKS
        if make_plan(models["7B"], parallel, ranks, h100.memory)[1]
    }
    assert fitting == {("fsdp", ranks) for ranks in RANKS if ranks >= 4}


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


def test_ddp_messages_are_gradients_once_and_fsdp_gathers_twice_a_micro_step(h100):
    model = small_model()
    device = replace(h100, flop_per_second={"small": 1e12})
    network = Network("no waits", 1e9, 1e9, inside_hop_s=0, between_hop_s=0)
    counts, idle = model.counts, {"forward": 0.0, "backward": 0.0, "head": 0.0, "once": 0.0}
    silent = {"launch_forward": 0.0, "launch_backward": 0.0, "agree": 0.0}

    def seconds(parallel: str, at_a_time: int) -> float:
        pieces = make_pieces(Plan(model, parallel, 2, at_a_time, False), device, network)
        return step_seconds(replace(pieces, **idle, **silent))

    assert seconds("ddp", 1) == seconds("ddp", 4) == pytest.approx(4e-9 * counts.parameters)
    sent = 4 * counts.parameters / 2  # reduce-scatter moves (W - 1) / W
    gathered = (2 * 2 * 5 * counts.block + 4 * counts.root) / 2
    assert seconds("fsdp", 4) == pytest.approx(1e-9 * (sent + gathered))
    assert seconds("fsdp", 1) == pytest.approx(1e-9 * (sent + 4 * gathered))


def test_formula_and_simulation_agree_in_every_row(rows):
    assert len(rows) > 70
    for plan, pieces in rows:
        assert step_seconds(pieces) == pytest.approx(simulated_seconds(pieces), rel=0.02), plan


def test_formula_and_simulation_agree_whatever_the_pieces_are():
    draw = random.Random(1)
    for _ in range(300):
        times = [10 ** draw.uniform(-4, -1) for _ in range(11)]
        pieces = Pieces(draw.randint(4, 60), draw.randint(1, 5), *times[:8], 0.9, *times[8:])
        simulated = simulated_seconds(pieces)
        assert step_seconds(pieces) == pytest.approx(simulated, rel=0.2)
        # what the queues have to do, and the order of one micro-step, are bounds of both
        assert simulated >= pieces.host * (1 - 1e-9)


def test_a_step_alone_is_its_work_and_without_a_network_nothing_else(models, h100):
    plan, _ = make_plan(models["124M"], "ddp", 1, h100.memory)
    pieces = make_pieces(plan, h100, networks()[0])
    work = plan.model.case.n_tokens * plan.model.counts.flop / h100.flop_per_second["124M"]
    assert step_seconds(pieces) == pytest.approx(work + pieces.once)
    assert efficiency(plan, h100, step_seconds(pieces)) == pytest.approx(1)


def test_recomputing_takes_a_third_more(models, h100):
    plan = Plan(models["7B"], "fsdp", 1, 1, False)
    free = Network("free", math.inf, math.inf, 0, 0)
    pieces, again = (make_pieces(p, h100, free) for p in (plan, replace(plan, recomputes=True)))
    assert again.forward + again.backward == pytest.approx(
        4 / 3 * (pieces.forward + pieces.backward)
    )


def test_no_row_is_better_than_work_alone_and_a_slower_network_is_never_faster(rows, h100):
    for (plan, fast), (_, slow) in zip(rows[::2], rows[1::2], strict=True):
        assert efficiency(plan, h100, step_seconds(fast)) <= 1 + 1e-9
        assert step_seconds(slow) >= step_seconds(fast)


def test_a_gpu_with_little_to_do_waits_for_its_host(models, h100):
    plan, _ = make_plan(models["124M"], "ddp", 256, h100.memory)
    pieces = make_pieces(plan, h100, networks()[0])
    launching, agreeing = 12 * 90 * 5e-6, 2 * 255 * 30e-6
    assert step_seconds(pieces) == pytest.approx(launching + agreeing)


# ------------------------------------------------------------------------------------- measuring


def test_two_sizes_tell_what_a_step_takes_once_and_what_a_window_takes():
    assert split_seconds((1, 2, 4), [5.0, 9.0, 11.0]) == pytest.approx((3.0, 2.0))
    # noise can't make the once negative
    assert split_seconds((1, 2, 4), [1.0, 2.0, 8.0]) == (0.0, 2.0)


def test_the_measured_cpu_is_predicted_between_its_sizes(results):
    speed = results["speed"]["124M"]
    assert speed["predicted_seconds"][1] == pytest.approx(speed["seconds"][1], rel=0.1)
    work = 4 * 256 * count(replace(scaling.cases()[0].config, context_length=256)).flop
    once = speed["once_s_per_parameter"] * speed["parameters"]
    assert work / speed["flop_per_second"] + once == pytest.approx(speed["seconds"][2])


@pytest.fixture
def small_cases(monkeypatch, tmp_path):
    case = small_model().case
    monkeypatch.setattr(scaling, "cases", lambda: [case])
    sizes = Sizes((1, 2, 4), n_layers=2, n_tokens=16)
    monkeypatch.setattr(scaling, "SIZES", {"cpu": {"small": sizes}, "cuda": {"small": sizes}})
    monkeypatch.setattr(benchmarks.report, "RESULTS", tmp_path)
    monkeypatch.setattr(scaling, "pick_device", lambda _: CPU)
    return tmp_path / "scaling-cpu.json"


def test_what_is_measured_takes_the_place_of_what_is_published(small_cases, capsys):
    scaling.main(["--measure"])
    written = json.loads(small_cases.read_text(encoding="utf-8"))
    speed = written["speed"]["small"]
    whole = GPTModel(replace(SMALL["gpt2"], n_layers=2)).count_parameters()
    assert speed["parameters"] == whole - 16 * 48  # a context of 16 has 16 positions fewer
    assert speed["n_tokens"] == 16 and len(speed["seconds"]) == 3
    assert Activations(**written["activations"]["small"]) == small_model().kept
    device = scaling.measured_device(written)
    assert device.flop_per_second == {"small": speed["flop_per_second"]}
    assert device.launched_s == 0 and device.memory == written["memory"]
    capsys.readouterr()
    scaling.main(["--device-results", str(small_cases)])
    printed = capsys.readouterr().out
    assert "measured on" in printed and "published" not in printed
    assert "| small | 5 x 48 |" in printed


def test_a_measured_gpu_keeps_something_for_itself_and_its_host_launches(results):
    gpu = results | {"machine": results["machine"] | {"device": "cuda", "name": "G"}, "memory": 9e9}
    device = scaling.measured_device(gpu)
    assert (device.name, device.memory) == ("G", 5e9)
    assert device.launched_s == scaling.Assumptions().launched_s
    unknown = scaling.measured_device(results | {"memory": None})
    assert unknown.memory == math.inf


def test_a_model_that_memory_is_too_small_for_is_left_out(small_cases, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(scaling, "measure_speed", fail)
    with pytest.raises(SystemExit, match="nothing could be measured"):
        scaling.main(["--measure"])
    assert "small: there is too little memory here" in capsys.readouterr().out
    assert not small_cases.exists()


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"machine": {"device": "cpu"}}'])
def test_a_file_that_has_no_results_is_refused_with_the_command_that_writes_one(
    tmp_path, capsys, content
):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        scaling.main(["--device-results", str(path)])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "results.json can't be read" in message
    assert "python -m benchmarks.scaling --measure" in message


@pytest.mark.parametrize("speed", ["0", "-1", "nan"])
def test_a_network_without_a_speed_is_refused(capsys, speed):
    with pytest.raises(SystemExit):
        scaling.main(["--inside", speed])
    assert "above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "shown"), [(0.0360, "0.0360"), (1.11, "1.11"), (63.84, "63.8"), (1244.6, "1,245")]
)
def test_three_digits_count(number, shown):
    assert three_digits(number) == shown
