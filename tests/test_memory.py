"""What memory a run takes, how it fits itself to less, and what it does where that runs out."""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import planning.machine
import train
from engine import memory
from engine.errors import ResourceError, is_out_of_memory
from engine.memory import (
    MemoryEstimate,
    OutOfStepMemory,
    available_memory,
    estimate_memory,
    measure_activations,
)
from engine.precision import Precision
from environment import prepare_environment
from model import GPTConfig, GPTModel
from tests.forking import CAN_FORK, run_fork
from tests.letters import CPU, FP32, loader_of_13_windows, new_trainer, tiny_loaders, tiny_model
from tests.pretend.windows import CAN_PRETEND, windows
from tests.resuming import Bench, compare, sha256, uninterrupted
from train import training_loop
from training.learner import steps_between

BF16 = Precision("bf16", "as set", "cpu")
MODELS = {
    "plain": {},
    "dropout": {"drop_rate": 0.1},
    "attention dropout": {"attention_drop_rate": 0.1},
    "untied": {"tie_embeddings": False},
    "llama": {"architecture": "llama"},
}


@pytest.fixture
def bench(workdir, monkeypatch) -> Bench:
    return Bench(workdir, monkeypatch)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """To look through all that the tests have imported takes longer than a test."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def small_model(**changes) -> GPTModel:
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "context_length": 96, "emb_dim": 32, "n_heads": 2, "n_layers": 3}
    return GPTModel(GPTConfig(**(shape | changes)))


def estimate(model: GPTModel, **changes) -> MemoryEstimate:
    options = {"n_tokens": 96, "n_windows": 4, "precision": FP32, "device": CPU} | changes
    return estimate_memory(model, **options)


def count_tensors() -> int:
    gc.collect()
    return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("kind", MODELS)
def test_activations_measured_on_few_tokens_are_those_of_all(monkeypatch, kind):
    model = small_model(**MODELS[kind])
    found = [measure_activations(model, 96, precision, CPU) for precision in (FP32, BF16)]
    monkeypatch.setitem(memory.PROBED_TOKENS, "cpu", 96)
    expected = [measure_activations(model, 96, precision, CPU) for precision in (FP32, BF16)]
    for (fixed, window), (expected_fixed, expected_window) in zip(found, expected, strict=True):
        assert window == pytest.approx(expected_window, rel=0.02)
        # what windows share: half-precision weights, a mask of T x T
        assert abs(fixed - expected_fixed) <= 0.05 * window


def test_activations_are_what_a_block_is_known_to_keep():
    models = [small_model(n_layers=n_layers) for n_layers in (3, 5)]
    windows = [measure_activations(model, 96, FP32, CPU)[1] for model in models]
    # by hand, in units of a (T, C) tensor: two norms' inputs and outputs, q, k and v, attention's
    # output twice (as heads give it, and in order), the MLP's 4 before and 4 after its activation
    assert 14 <= (windows[1] - windows[0]) / 2 / (96 * 32 * 4) <= 18


def test_half_precision_keeps_a_copy_of_the_weights_and_full_precision_nothing_beside_windows():
    model = small_model(drop_rate=0.1).eval()
    model.activation_checkpointing = True
    before, weights = torch.get_rng_state(), sha256(*model.parameters())
    n_tensors = count_tensors()
    fixed, window = measure_activations(model, 96, BF16, CPU)
    assert count_tensors() == n_tensors  # none stays in memory
    hidden = sum(weight.numel() for weight, _ in model.hidden_matrices())
    assert 2 * hidden <= fixed <= 2 * hidden * 1.1
    assert window < measure_activations(model, 96, FP32, CPU)[1]
    # measuring leaves everything as it was
    assert torch.equal(torch.get_rng_state(), before)
    assert sha256(*model.parameters()) == weights
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training and model.activation_checkpointing
    for kind in ("plain", "untied", "llama"):
        assert measure_activations(small_model(**MODELS[kind]), 96, FP32, CPU)[0] == 0
    fixed, window = measure_activations(small_model(), 1, FP32, CPU)  # of a single token
    assert fixed == 0 < window


def test_each_part_has_the_bytes_that_it_has():
    model = small_model()
    count = model.count_parameters()
    hidden = sum(weight.numel() for weight, _ in model.hidden_matrices())
    found = estimate(model, keeps_best=True)
    assert found.weights == found.gradients == found.best_weights == 4 * count
    assert found.optimizer == 8 * count
    assert estimate(model).best_weights == 0
    assert estimate(model, optimizer="muon").optimizer == 8 * count - 4 * hidden
    assert found.total(5) - found.total(4) == found.window
    parts = [found.weights, found.gradients, found.optimizer, found.best_weights, found.head]
    assert found.total(4) == sum(parts) + found.activations_of(4)


def test_checkpointing_keeps_blocks_inputs_and_one_block_and_the_head_some_rows():
    model = small_model(n_layers=6)
    plain = estimate(model)
    model.activation_checkpointing = True
    saving = estimate(model)
    inputs = 6 * 96 * 32 * 4
    assert inputs < saving.window < plain.window / 2
    assert saving.window == pytest.approx(inputs + plain.window / 6, rel=0.01)
    # and the head of a large batch takes no more than some rows of logits
    model = small_model(vocab_size=20_000)
    few, many, more = (estimate(model, n_windows=n).head for n in (1, 64, 256))
    assert few < many == more < 64 * 96 * 20_000 * 4


@pytest.mark.parametrize(
    ("n_windows", "room", "expected"),
    [(8, 900, 8), (8, 899, 4), (8, 400, 2), (5, 500, 3), (5, 399, 2), (8, 200, 1), (8, 199, 0)],
)
def test_windows_are_halved_until_they_fit(n_windows, room, expected):
    parts = {"weights": 20, "gradients": 20, "optimizer": 40, "best_weights": 0}
    size = MemoryEstimate(**parts, activations=10, window=100, head=10)
    assert size.total(1) == 200
    assert size.largest_fit(n_windows, room) == expected
    assert size.largest_fit(n_windows, None) == n_windows


PEAK = """
import torch
from engine.memory import estimate_memory
from engine.optim import build_adamw
from engine.precision import Precision
from model import GPTConfig, GPTModel
from training.learner import take_step

torch.set_num_threads(1)
precision, device = Precision(PRECISION, "as set", "cpu"), torch.device("cpu")
warm = torch.randn(64, 64, requires_grad=True)  # libraries, which are no part of a step
(warm @ warm).sum().backward()
torch.optim.AdamW([warm], fused=True).step()

def held(name):
    # not getrusage: its peak begins with what the parent held when it started this process
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

before = held("VmRSS")
shape = {"vocab_size": 20_000, "emb_dim": 256, "n_heads": 4, "n_layers": 4}
model = GPTModel(GPTConfig(context_length=N_TOKENS, **shape))
model.activation_checkpointing = SAVES
size = estimate_memory(
    model, n_tokens=N_TOKENS, n_windows=N_WINDOWS, precision=precision, device=device
)
optimizer = build_adamw(model, 1e-3, 0.1)
# a short step makes the moments that every later one has beside it: the peak is the long one's
for batch in ((1, 8), (N_WINDOWS, N_TOKENS)):
    ids = torch.randint(20_000, batch)
    take_step(model, [(ids, ids)], optimizer, precision, 1.0)
print(size.total(N_WINDOWS), held("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not CAN_FORK, reason="reads /proc")
@pytest.mark.parametrize(
    ("n_windows", "n_tokens", "saves", "precision"),
    [(8, 128, False, "fp32"), (8, 128, True, "fp32"), (1, 64, False, "bf16")],
)
def test_the_estimate_is_within_30_percent_of_what_steps_take(
    n_windows, n_tokens, saves, precision, tmp_path
):
    code = f"N_WINDOWS, N_TOKENS, SAVES, PRECISION = {n_windows, n_tokens, saves, precision}\n"
    estimated, peak = map(int, run_fork(code + PEAK, tmp_path).split())
    assert 0.7 * peak < estimated < 1.3 * peak, f"{estimated / 1e6:.0f}, {peak / 1e6:.0f} MB"


def test_a_container_leaves_its_limit_less_what_cannot_be_taken_back(tmp_path):
    files = {
        "1/proc/self/cgroup": "0::/a/b\n",
        "1/fs/cgroup/a/b/memory.max": "max\n",
        "1/fs/cgroup/a/memory.max": "1000\n",
        "1/fs/cgroup/a/memory.current": "700\n",
        "1/fs/cgroup/a/memory.stat": "anon 500\nactive_file 120\ninactive_file 30\n",
        # of version 1; within a container its group stands at the root, and its path leads nowhere
        "2/proc/self/cgroup": "5:cpu:/x\n4:cpuset,memory:/docker/x\n0::/\n",
        "2/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
        "2/fs/cgroup/memory/memory.usage_in_bytes": "900\n",
        "2/fs/cgroup/memory/memory.stat": "total_active_file 50\ntotal_inactive_file 25\n"
        "inactive_file 7\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    # in the third nothing tells
    rooms = [memory._container_rooms(tmp_path / n / "proc", tmp_path / n) for n in "123"]
    assert rooms == [[450], [175], []]


def test_the_tightest_of_all_limits_counts(monkeypatch):
    for system, address, containers, room in (
        (500, None, [700, 300], 300),
        (500, 400, [], 400),
        (None, None, [], None),
    ):
        monkeypatch.setattr(memory, "_system_room", lambda x=system: x)
        monkeypatch.setattr(memory, "_address_room", lambda x=address: x)
        monkeypatch.setattr(memory, "_container_rooms", lambda proc, sys, x=containers: x)
        assert available_memory(CPU) == room


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_has_some_memory_and_a_limit_of_the_process_counts():
    import resource  # Windows has none

    built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 50e6 < available_memory(CPU) <= built_in
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (taken + 300_000_000, before[1]))
        assert 200e6 < available_memory(CPU) <= 300e6
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_errors_that_say_that_memory_ran_out_are_known():
    cpu = "DefaultCPUAllocator: can't allocate memory: you tried ..."
    texts = (cpu, "std::bad_alloc", "CUDA error: out of memory")
    known = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), *map(RuntimeError, texts)]
    others = [RuntimeError("shapes don't match"), ValueError("can't allocate")]
    others += [ResourceError("out of memory: said already")]
    assert all(map(is_out_of_memory, known)) and not any(map(is_out_of_memory, others))


@pytest.mark.skipif(not CAN_PRETEND, reason="needs Linux to pretend")
def test_windows_is_asked_for_what_is_free():
    with windows(), pytest.MonkeyPatch.context() as patch:
        assert memory._system_room() == 8 << 30
        patch.setattr(ctypes.windll.kernel32, "GlobalMemoryStatusEx", lambda place: 0)
        assert memory._system_room() is None


def limit_memory(patch: pytest.MonkeyPatch, n_windows: float | None) -> None:
    """Let this machine have room for so many windows of the run that is prepared; None: unsaid."""

    def measured(model: GPTModel, **options) -> MemoryEstimate:
        size = estimate_memory(model, **options)
        room = size.total(0) + int(((n_windows or 0) + 0.5) * size.window) - size.weights
        patch.setattr(
            planning.machine, "available_memory", lambda _: None if n_windows is None else room
        )
        return size

    patch.setattr(planning.machine, "estimate_memory", measured)


def prepared(bench: Bench, n_windows: float | None = 99):
    """A prepared run on a machine that has room for so many windows, and its micro-batch."""
    with pytest.MonkeyPatch.context() as patch:
        limit_memory(patch, n_windows)
        env = prepare_environment(bench.folder / "settings.py")
    assert env.train_loader.batch_sampler.micro_batch == env.run.record.micro_batch
    return env, env.run.record.micro_batch


def test_what_does_not_fit_goes_in_fewer_windows_at_a_time(bench, capsys):
    bench.describe("run", gradient_accumulation_steps=2)
    for n_windows in (99, None):
        whole, micro_batch = prepared(bench, n_windows)
        said = capsys.readouterr().out
        assert micro_batch == 4 and "Memory: about " in said
        assert ("free" in said) == (n_windows is not None)
    env, micro_batch = prepared(bench, 2)
    assert micro_batch == 2
    batches, expected = (e.train_loader.batch_sampler for e in (env, whole))
    assert (batches.step_size, batches.n_steps) == (expected.step_size, expected.n_steps)
    [notice] = [line for line in capsys.readouterr().out.splitlines() if "at a time" in line]
    assert "2 windows at a time instead of 4" in notice and "the batch stays the same" in notice


def test_where_not_even_one_window_fits_the_run_says_so_before_it_begins(bench):
    bench.describe("run")
    with pytest.raises(ResourceError) as raised:
        prepared(bench, 0)
    assert len(str(raised.value).splitlines()) <= 4 and raised.value.exit_code == 6
    for said in ("single window of 16 tokens", "weights", "activation_checkpointing", "max_length"):
        assert said in str(raised.value)
    bench.describe("run", model_overrides={"emb_dim": 65536, "n_heads": 512, "n_layers": 1024})
    bench.patch.setattr(planning.machine, "build_model", None)  # it would take 52 TB
    with pytest.raises(ResourceError, match=r"takes more than [\d,.]+ GB of memory.*\n.*n_layers"):
        prepared(bench)
    assert not bench.run.exists()


def run_out_of_memory(
    above: int, *, from_call: int = 1, training: bool = True
) -> Callable[[GPTModel], None]:
    """Give a model no memory for more than `above` windows, from a forward pass on.

    It lacks in training, or else in evaluations.
    """

    def prepare(model: GPTModel) -> None:
        count = 0

        def refuse(block: torch.nn.Module, arguments: tuple) -> None:
            nonlocal count
            is_meant = torch.is_grad_enabled() == training
            count += is_meant
            if is_meant and count >= from_call and len(arguments[0]) > above:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        # the last block: by then dropout has drawn on the generator
        model.blocks[-1].register_forward_pre_hook(refuse)

    return prepare


def trained_in_parts(micro_batch: int, prepare=None, **shape) -> tuple:
    """Five steps on 13 windows: weights, losses of steps, and of evaluations after the first."""
    model = tiny_model(**shape)
    if prepare is not None:
        prepare(model)
    trainer = new_trainer(5, model=model)
    val_loader = tiny_loaders()[1]
    val_loader.batch_sampler.micro_batch = micro_batch
    training_loop(trainer, loader_of_13_windows(micro_batch), val_loader)
    history = trainer.journal.history
    evaluations = history.train_losses[1:], history.val_losses[1:]
    return [p.detach().clone() for p in model.parameters()], history.batch_losses, evaluations


@pytest.mark.parametrize("above", [1, 2])
def test_a_step_that_runs_out_of_memory_is_made_again_in_smaller_parts(above, capsys, monkeypatch):
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 1)
    weights, *losses = trained_in_parts(above, drop_rate=0.2)
    assert "ran out of memory" not in capsys.readouterr().out
    for from_call in (1, 2):
        prepare = run_out_of_memory(above, from_call=from_call)
        found, *found_losses = trained_in_parts(3, prepare, drop_rate=0.2)
        said = capsys.readouterr().out
        assert said.count("Note: step 1 ran out of memory") == (2 if above == 1 else 1)
        assert "2 windows at a time instead of 3 from here on, the batch stays the same" in said
        # bit for bit what a run comes to that had so many windows at a time from the first
        assert found_losses == losses
        assert sha256(*found) == sha256(*weights)


def test_memory_that_runs_out_later_changes_no_step_before_and_no_sum_after(capsys, monkeypatch):
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 1)
    weights, losses, evaluations = trained_in_parts(3)
    # two parts a step, one in the third: the seventh is the second of step 4
    found = trained_in_parts(3, run_out_of_memory(1, from_call=7))
    said = capsys.readouterr().out
    assert said.count("Note: step 4 ran out of memory") == 2
    assert found[1][:3] == losses[:3]
    assert found[1] == pytest.approx(losses, abs=1e-5)
    torch.testing.assert_close(found[0], weights, rtol=0, atol=1e-3)
    for some, others in zip(found[2], evaluations, strict=True):
        assert some == pytest.approx(others, abs=1e-4)


def test_an_evaluation_that_runs_out_of_memory_is_made_again_in_smaller_parts(capsys):
    train_loader, val_loader = tiny_loaders()
    expected = new_trainer(0).evaluate(val_loader)
    model = tiny_model()
    run_out_of_memory(1, training=False)(model)
    trainer = new_trainer(2, model=model)
    assert trainer.evaluate(val_loader) == pytest.approx(expected, rel=1e-6)
    told = "an evaluation ran out of memory: 1 windows at a time instead of 2 from here on"
    assert capsys.readouterr().out.count(told) == 1
    sizes = []
    model.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    trainer.step(next(steps_between(train_loader, 0, 1)))
    trainer.evaluate(val_loader)
    assert set(sizes) == {1}  # steps, and later evaluations
    assert "ran out of memory" not in capsys.readouterr().out


def test_an_evaluation_without_memory_for_a_window_ends_the_run(bench):
    bench.describe("run")
    bench.prepare_model = run_out_of_memory(0, training=False)
    with pytest.raises(ResourceError, match="an evaluation ran out of memory with a single window"):
        bench.session()


def test_what_smaller_parts_would_not_mend_is_not_tried_again():
    by_optimizer, by_model = new_trainer(7), new_trainer(7)
    said = ["DefaultCPUAllocator: can't allocate memory", "the shapes don't match"]
    calls = []

    def fail(*arguments) -> None:
        calls.append(1)
        raise RuntimeError(said[len(calls) - 1])

    by_optimizer.learner.optimizer.register_step_pre_hook(fail)  # the weights may have changed
    by_model.learner.model.blocks[0].register_forward_pre_hook(fail)
    [batches] = list(steps_between(loader_of_13_windows(2), 0, 1))
    for trainer, text in zip((by_optimizer, by_model), said, strict=True):
        with pytest.raises(RuntimeError, match=text) as raised:
            trainer.step(batches)
        assert not isinstance(raised.value, OutOfStepMemory)
    assert len(calls) == 2


@pytest.mark.slow
def test_a_run_that_ran_out_of_memory_is_stopped_and_goes_on_exactly(bench):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 9}
    # one that had no more memory from its first step on, and was never stopped
    bench.prepare_model = run_out_of_memory(2)
    expected = uninterrupted(bench, **settings)
    bench.describe("run", **settings)
    bench.signal_at("take_step", 3, 7, after=True)
    found = bench.finish()
    assert bench.stopped_at and bench.env.learner.micro_batch == 2
    saved = json.loads((bench.run / "settings.json").read_text(encoding="utf-8"))
    assert saved["micro_batch"] == 2
    assert [change.get("micro_batch") for change in saved["changes"]] == [[4, 2]]
    compare(found, expected)


def test_a_window_too_much_ends_the_run_with_6_and_names_the_checkpoint(bench):
    bench.describe("run", save_every=3)
    bench.prepare_model = run_out_of_memory(0, from_call=8)
    with pytest.raises(ResourceError) as raised:
        bench.session()
    assert raised.value.exit_code == 6
    lines = str(raised.value).splitlines()
    assert len(lines) <= 4
    assert "single window" in lines[0] and "activation_checkpointing" in lines[1]
    assert lines[-1].endswith("step-00000006")


LIMITED = """
import resource
import numpy, torch
from environment import prepare_environment
from train import train

torch.set_num_threads(1)
numpy.ones((64, 64)) @ numpy.ones((64, 64))  # its library takes memory once, which isn't a step's
env = prepare_environment("settings.py")
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
limit = taken + 130_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
train(env)
"""


@pytest.mark.slow
@pytest.mark.skipif(not CAN_FORK, reason="other systems don't heed the limit")
def test_a_limit_on_memory_is_lived_with(bench):
    # some 0.3 MB a window: an evaluation fits, a step with 512 at a time does not
    params = {"max_steps": 1, "warmup_steps": 0, "batch_size": 512, "max_length": 64}
    model = {"emb_dim": 32, "n_heads": 2, "n_layers": 2}
    bench.describe("run", eval_iter=1, model_overrides=model, **params)
    (bench.folder / "text.txt").write_text("abcdefgh " * 9000, encoding="utf-8")
    assert "ran out of memory" in run_fork(LIMITED, bench.folder)
    saved = json.loads((bench.run / "settings.json").read_text(encoding="utf-8"))
    assert 1 <= saved["micro_batch"] < 512
    assert (bench.run / "checkpoints" / "step-00000001").is_dir()
