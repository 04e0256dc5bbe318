"""The whole program on GPUs that are pretended: real numbers, torch's own Python, no kernel."""

import contextlib
import gc
import io
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import main
import storage.cache
import train
from data import make_loaders, plan_windows
from engine.loss import next_token_loss
from engine.optim import build_optimizer
from engine.precision import choose_precision
from generation import generate
from model import GPTConfig, GPTModel
from tests.pretend.child import on_pretended
from tests.pretend.device import MOST_STAGED, DeviceFault, Kernels, watching
from tests.pretend.machines import XPU_MACHINE, cuda_machine, mac
from training import learner

TEXT = "The ship turned north, and nobody aboard said why. Below, the lamps were lit early. " * 8
SETTINGS = {
    "DATA": "text.txt",
    "TOKENIZER": "char",
    "CUSTOM_MODE": True,
    "MODEL": "small",
    "RUN_NAME": "tiny",
    "LOG_EVERY": 1,
    "sampling_params": {"max_new_tokens": 2},
}
PARAMS = {
    "max_steps": 3,
    "save_every": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_length": 16,
    "eval_iter": 1,
    "n_layers": 1,
    "emb_dim": 16,
    "n_heads": 2,
    "drop_rate": 0.1,
    "start_context": "The",
}


def run(folder: Path, params: dict[str, Any] | None = None, **settings: Any) -> tuple[int, str]:
    """The exit code and the output of main.py with these settings beside the usual ones."""
    settings = SETTINGS | settings | {"custom_params": PARAMS | (params or {})}
    (folder / "text.txt").write_text(TEXT)
    (folder / "settings.py").write_text("".join(f"{k} = {v!r}\n" for k, v in settings.items()))
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "GPT_DEBUG", "1")
        patch.setitem(sys.modules, "matplotlib.figure", None)
        patch.setattr(storage.cache, "CACHE", folder / "cache")
        patch.setattr(train, "SAMPLE_TOKENS", 2)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = main.main(["settings.py"])
    return code, said.getvalue()


def run_with_a_stop(folder: Path, params: dict[str, Any], **settings: Any) -> str:
    """The output of a run that a signal stops at its second step, and then goes on.

    It ends with the weights of a run that nothing stops.
    """
    noted = main.Journal.step

    def step(self, *args):
        rows = noted(self, *args)
        if self.steps == 2:
            signal.raise_signal(signal.SIGTERM)
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.Journal, "step", step)
        code, said = run(folder, params, **settings)
        assert code == 128 + signal.SIGTERM, said
    said += run_to_its_end(folder, params, **settings)
    assert "2 of 3 steps are done" in said
    run_to_its_end(folder, params, **settings, RUN_NAME="whole")
    last = "checkpoints/step-00000003/model.safetensors"
    weights = [(folder / "runs" / name / last).read_bytes() for name in ("tiny", "whole")]
    assert weights[0] == weights[1]
    return said


def run_to_its_end(folder: Path, params: dict[str, Any] | None = None, **settings: Any) -> str:
    """The output of a run that comes to its end."""
    code, said = run(folder, params, **settings)
    assert code == 0, said
    return said


# what three capabilities train in, with a build of torch that serves each; and in which model
CUDA = {
    (6, 0): ("fp32", "12.6", {"optimizer": "adamw", "architecture": "gpt2"}),
    (7, 5): ("fp16", "13.0", {"optimizer": "muon", "architecture": "llama"}),
    (12, 0): ("bf16", "13.0", {"optimizer": "adamw", "architecture": "llama"}),
}


@on_pretended(
    *(cuda_machine(capability, cuda=cuda) for capability, (_, cuda, _) in CUDA.items()),
    cuda_machine((9, 0), (8, 0), cuda="13.0"),
)
def test_cuda_gpus_train_go_on_and_write_and_the_host_does_not_wait(kernels: Kernels, folder: Path):
    if len(kernels.machine.cards) == 1:  # the program on each, all in one process: it starts slowly
        check_a_run_on_a_cuda_gpu(kernels, folder)
        return
    check_that_the_pretence_refuses(kernels)
    check_recorded_graphs(kernels)
    check_loss_of_many_rows("cuda:0")
    check_generation("cuda:0")
    check_steps_without_a_wait(kernels)
    check_a_run_that_waits_only_to_tell(kernels, folder)
    check_copies_of_batches(kernels)
    check_a_batch_that_is_too_large(kernels, folder)
    said = run_to_its_end(folder, RUN_NAME="second", DEVICE="cuda:1")
    assert "(using cuda:1)" in said


def check_a_run_on_a_cuda_gpu(kernels: Kernels, folder: Path) -> None:
    """The program says what it has found and trains in that precision; it stops and goes on."""
    [card] = kernels.machine.cards
    precision, _, params = CUDA[card.capability]
    said = run_with_a_stop(folder, params)
    assert f"GPU: {card.name}\n" in said
    assert f"Precision: {precision} (" in said
    assert "Device consistency verified (using cuda:0)" in said
    assert all(line in said for line in ("Greedy: The", "Top-k (50): The", "Top-p (0.9): The"))


@on_pretended(mac(14), mac(15))
def test_a_run_on_a_mac_trains_stops_goes_on_and_writes(kernels: Kernels, folder: Path):
    if kernels.machine.macos == (14, 0):
        said = run_to_its_end(folder, {"optimizer": "muon"})
        check_strided_results(is_wrong=True)
    else:
        said = run_with_a_stop(folder, {"optimizer": "muon", "architecture": "llama"})
        check_loss_of_many_rows("mps")
        check_generation("mps")
        check_strided_results(is_wrong=False)
    assert "GPU: Apple Silicon\n" in said
    assert "(using mps" in said
    with pytest.raises(TypeError, match="fp64"):
        torch.zeros(2, device="mps", dtype=torch.float64)


def check_strided_results(*, is_wrong: bool) -> None:
    """Metal's graphs before macOS 15 get the results wrong that are a part of a tensor."""
    x = torch.ones(4, 4, device="mps")
    refused = pytest.raises(DeviceFault, match="out= is a part of a tensor")
    for out in (torch.zeros(4, 8, device="mps")[:, :4], torch.zeros(8, 4, device="mps")[4:]):
        with refused if is_wrong else contextlib.nullcontext():
            torch.mm(x, x, out=out)
    torch.mm(x, x, out=torch.empty(4, 4, device="mps"))


@on_pretended(XPU_MACHINE)
def test_a_run_on_an_intel_gpu_trains_stops_goes_on_and_writes(kernels: Kernels, folder: Path):
    said = run_with_a_stop(folder, {}, DEVICE="xpu")
    assert f"GPU: {kernels.machine.cards[0].name}\n" in said
    assert "(using xpu:0)" in said
    check_loss_of_many_rows("xpu")
    check_generation("xpu")


def check_that_the_pretence_refuses(kernels: Kernels) -> None:
    """What a real GPU refuses or waits for: else the tests below could not fail."""
    x = torch.ones(3, 4, device="cuda:0")
    for elsewhere in ("cpu", "cuda:1"):
        with pytest.raises(DeviceFault, match="index_select mixes devices"):
            x.index_select(0, torch.tensor([1, 2], device=elsewhere))
    assert (x * torch.tensor(2.0)).device == x.device  # a 0-d tensor of the CPU may
    with watching(kernels) as seen:
        x.sum().item()
        x.cpu()
        torch.zeros(20_000).to("cuda:0")
        torch.zeros(20_000).to("cuda:0", non_blocking=True)
        torch.zeros(20_000).pin_memory().to("cuda:0", non_blocking=True)
        torch.zeros(2_000).to("cuda:0")
    assert [wait.what for wait in seen] == ["read", "read", "copy", "copy"]
    assert all("check_that_the_pretence_refuses" in wait.stack for wait in seen)


def check_recorded_graphs(kernels: Kernels) -> None:
    """A graph computes again with the numbers that are in its inputs by then, and reads none."""
    x = torch.arange(4.0, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = (x * 2).view(2, 2)
    x.fill_(5)
    graph.replay()
    assert doubled.tolist() == [[10, 10], [10, 10]]
    with pytest.raises(DeviceFault, match="waits for the device"), torch.cuda.graph(graph):
        x.sum().item()
    kernels.recording = None


def check_loss_of_many_rows(device: str) -> None:
    """The loss and both gradients are the CPU's, for more rows than go through at once."""
    hidden, head, targets = (
        torch.randn(2, 4200, 8),
        torch.randn(70, 8),
        torch.randint(70, (2, 4200)),
    )
    found = []
    for place in ("cpu", device):
        tensors = [t.clone().to(place).requires_grad_() for t in (hidden, head)]
        with torch.autocast(torch.device(place).type, dtype=torch.bfloat16):
            loss = next_token_loss(*tensors, targets.to(place))
        loss.backward()
        found.append([t.detach().cpu() for t in (loss, *(t.grad for t in tensors))])
    for expected, result in zip(*found, strict=True):
        assert (expected - result).norm() < 0.02 * expected.norm()


TINY = {"vocab_size": 70, "context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 1}


def tiny_model(**changes: Any) -> GPTModel:
    """A model of seeded weights on the CPU."""
    torch.manual_seed(1)
    return GPTModel(GPTConfig(**TINY | changes))


def check_generation(device: str) -> None:
    """Greedy tokens are the CPU's, past the context's end too; drawn ones depend on the seed."""
    prompts = [[1, 2, 3], [4]]
    for model in (tiny_model(), tiny_model(architecture="llama", n_kv_heads=1)):
        expected = generate(model, prompts, max_new_tokens=9, temperature=0.0)
        model.to(device)
        assert generate(model, prompts, max_new_tokens=9, temperature=0.0) == expected
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            assert len(generate(model, prompts, max_new_tokens=2, temperature=0.0)) == 2

    def drawn(seed: int, **options: Any) -> list[list[int]]:
        generator = torch.Generator(device).manual_seed(seed)
        return generate(model, prompts, max_new_tokens=4, generator=generator, **options)

    for options in ({"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.01, "repetition_penalty": 1.2}):
        assert drawn(1, **options) == drawn(1, **options) != drawn(2, **options)


def check_steps_without_a_wait(kernels: Kernels) -> None:
    """A step of either architecture with either optimizer, in each precision, never waits."""
    device = torch.device("cuda:0")
    ids = torch.randint(70, (2, 8)).to(device)
    kinds = itertools.product(("gpt2", "llama"), ("adamw", "muon"), ("fp32", "bf16", "fp16"))
    for architecture, kind, name in kinds:
        model = tiny_model(architecture=architecture, drop_rate=0.1).to(device)
        optimizer = build_optimizer(kind, model, 1e-3, 0.1)
        precision = choose_precision(name, device)
        scaler = precision.scaler()
        with watching(kernels) as seen:
            batches = [(ids, ids)] * 2
            loss, _ = learner.take_step(model, batches, optimizer, precision, 1.0, scaler=scaler)
        assert seen == [], (architecture, kind, name)
        assert loss.isfinite()


def check_a_run_that_waits_only_to_tell(kernels: Kernels, folder: Path) -> None:
    """Twenty steps of the program: it reads at evaluations, saves, samples and a log's line."""
    params = {"max_steps": 20, "save_every": 20, "eval_freq": 20}
    with watching(kernels) as seen:
        run_to_its_end(folder, params, RUN_NAME="twenty", LOG_EVERY=10)
    training = [wait for wait in seen if "training_loop" in wait.stack]
    assert not [wait for wait in training if "Trainer.step" in wait.stack]
    assert not [wait for wait in training if wait.what == "copy"]
    told = ("evaluate_where_due", "Trainer.save", "Journal.fetch")
    own = [w for w in training if not any(place in name for name in w.stack for place in told)]
    assert own == []
    fetched = [wait for wait in training if "Journal.fetch" in wait.stack]
    assert 1 <= len(fetched) <= 2 + 2, fetched  # log lines, an evaluation, a save


def check_copies_of_batches(kernels: Kernels) -> None:
    """Batches of more than 64 KB, of tokens on the GPU or not, keep the host from nothing."""
    device = torch.device("cuda:0")
    tokens = (np.arange(9000) % 70).astype(np.uint16)
    plan, _ = plan_windows(9000, max_length=1024, stride=64, batch_size=16, train_ratio=0.9)
    for workers in (0, 1):
        loader, _ = make_loaders(tokens, plan, seed=1, num_workers=workers, device=device)
        batches = iter(loader)
        next(batches)
        with watching(kernels) as seen:
            ids, targets = learner.to_device(next(batches), device)
        assert ids.nbytes > MOST_STAGED
        assert seen == [], workers
        assert torch.equal((ids + 1) % 70, targets)


def check_a_batch_that_is_too_large(kernels: Kernels, folder: Path) -> None:
    """A step that runs out of memory is made again in smaller parts, with the same loss."""
    peaks, losses = {}, {}
    params = {"gradient_accumulation_steps": 1, "max_steps": 1, "drop_rate": 0.0, "n_layers": 4}

    def first_loss(name: str, batch_size: int) -> str:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(0)
        said = run_to_its_end(folder, params | {"batch_size": batch_size}, RUN_NAME=name)
        peaks[name] = torch.cuda.max_memory_allocated(0)
        row = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = next(json.loads(line)["train/loss"] for line in row if "train/loss" in line)
        return said

    first_loss("many", 16)
    # an evaluation, which keeps nothing for a backward pass, still fits
    torch.ops.pretended.set_limit(0, peaks["many"] * 9 // 10)
    assert "step 1 ran out of memory" in first_loss("halved", 16)
    torch.ops.pretended.set_limit(0, kernels.machine.cards[0].memory)
    assert losses["halved"] == pytest.approx(losses["many"], rel=1e-2)
