"""The checks of scripts.selfcheck: what a machine computes against what must come out.

Each is a function of a Bench that returns what it found, in words, or raises Failed. The models
have random weights and the texts random tokens; nothing of the user's is read or written.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import ATTENTIONS
from engine.devices import synchronize
from engine.optim import build_optimizer
from engine.precision import DTYPES, Precision
from engine.processor import using_threads
from engine.randomness import random_state, set_random_state
from generation import stream
from model import GPTConfig, GPTModel
from storage.checkpoint import CheckpointStore, optimizer_tensors, read_safetensors, weights_of
from training.learner import Learner, Step

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY, CONTEXT = 61, 32
LONG = 150  # positions, more than one block of attention by plain products
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "context_length": LONG,
    "emb_dim": 64,
    "n_heads": 4,
}
SHAPES = {
    "gpt2": GPTConfig(**SHAPE, n_layers=2, qkv_bias=True),
    "llama": GPTConfig(**SHAPE, n_layers=2, architecture="llama", n_kv_heads=2, qk_norm=True),
}
SPREAD = 6.0  # times the initial weights: attention then prefers some positions to others
# by precision, how far results may be off, as a share of their spread
ALLOWED = {"fp32": 0.003, "fp16": 0.02, "bf16": 0.04}
INITIAL_ALLOWED = 0.1  # nats above or below the logarithm of the vocabulary's size
OVERFIT_STEPS, OVERFIT_LOSS = 80, 0.2
# steps of the run that is killed, the one after which it is, and the most seconds of a process
RUN_STEPS, KILL_AT, MOST_RUN_S = 40, 5, 120.0
# of a training step's operations a second beside those of a plain product on a CPU: what is usual,
# and what is too little. An AMD EPYC has 0.6 in fp32; an Intel Xeon with AMX 0.27 to 0.67 in bf16
# with the models of benchmarks/results/train-cpu.json
USUAL_SHARE, LEAST_SHARE = (0.25, 0.7), 0.08
MOST_TIMING_S = 10.0


class Failed(Exception):
    """A check that has found a fault; the message says what is wrong."""


@dataclass(frozen=True)
class Bench:
    """Where and in which precision the checks compute."""

    device: torch.device
    precision: Precision

    @property
    def allowed(self) -> float:
        """How far results may be off, as a share of their spread."""
        return ALLOWED[self.precision.name]

    def models(self) -> Iterator[tuple[str, GPTModel]]:
        """A model of each architecture, in evaluation mode, with its name."""
        for name, config in SHAPES.items():
            torch.manual_seed(1)
            model = GPTModel(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(SPREAD if parameter.dim() > 1 else 1.0)
            yield name, model.to(self.device).eval()

    def tokens(self, *shape: int, seed: int = 2) -> Tensor:
        """Random token ids."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(VOCABULARY, shape, generator=generator).to(self.device)

    def learner(self, model: GPTModel, optimizer: torch.optim.Optimizer, micro: int = 0) -> Learner:
        """What trains a model here, in micro-batches of so many windows; 0: in one."""
        return Learner(model.train(), optimizer, self.precision, micro_batch=micro)


def check_logits(bench: Bench) -> str:
    """The logits and the loss of both architectures, by every kernel, against plain arithmetic."""
    worst = 0.0
    for name, model in bench.models():
        ids, targets = bench.tokens(3, LONG), bench.tokens(3, LONG, seed=3)
        expected = plain_logits(model, ids)
        chosen = expected.gather(-1, targets.cpu()[..., None])[..., 0]
        expected_loss = (expected.exp().sum(-1).log() - chosen).mean()
        for kernel in (None, *ATTENTIONS):  # the usual one without gradients, and each with them
            for block in model.blocks:
                block.attention.kernel = kernel
            with torch.set_grad_enabled(kernel is not None), bench.precision.autocast():
                found, loss = model(ids), model(ids, targets)
            what = f"{name} with {kernel or 'the usual'} attention"
            worst = max(worst, _off_by(found, expected, what, bench.allowed))
            spread = expected.std().item()
            if not abs(loss.item() - expected_loss.item()) <= bench.allowed * spread:
                raise Failed(f"the loss of {what} is {loss:.4f}; it must be {expected_loss:.4f}")
    return f"as plain fp64 arithmetic has them, off by {worst:.1g} of their spread"


def _off_by(found: Tensor, expected: Tensor, what: str, allowed: float) -> float:
    """The root-mean-square error as a share of the expected values' spread; Failed if too large."""
    found = found.detach().double().cpu()
    if n_odd := int((~found.isfinite()).sum()):
        raise Failed(f"{n_odd} of {found.numel()} numbers of {what} are not finite")
    error = ((found - expected).square().mean().sqrt() / expected.std()).item()
    if error > allowed:
        raise Failed(f"{what} is off by {error:.2g} of the spread; up to {allowed:g} is rounding")
    return error


def plain_logits(model: GPTModel, ids: Tensor) -> Tensor:
    """A model's logits, (B, T, V) in fp64 on the CPU, by the formulas of the papers alone."""
    config = model.config
    assert config.head_dim and config.n_kv_heads and config.norm_eps and config.ff_dim
    weights = {name: p.detach().double().cpu() for name, p in model.named_parameters()}
    ids = ids.cpu()
    T, H, K, D = ids.shape[1], config.n_heads, config.n_kv_heads, config.head_dim
    is_llama = config.architecture == "llama"

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(x: Tensor, name: str) -> Tensor:
        if not is_llama:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)

    def turned(x: Tensor) -> Tensor:  # (B, T, heads, D): pairs as complex numbers
        angles = torch.arange(T)[:, None] * config.rope_theta ** (-torch.arange(0, D, 2) / D)
        x = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones(T, D // 2), angles)[:, None]
        return torch.cat((x.real, x.imag), -1)

    x = weights["token_embedding.weight"][ids]
    if not is_llama:
        x = x + weights["position_embedding.weight"][:T]
    for layer in range(config.n_layers):
        name = f"blocks.{layer}."
        qkv = linear(norm(x, f"{name}attention_norm"), f"{name}attention.qkv")
        q, k, v = qkv.unflatten(-1, (-1, D)).split((H, K, K), dim=2)
        if config.qk_norm:
            q, k = norm(q, f"{name}attention.q_norm"), norm(k, f"{name}attention.k_norm")
        if is_llama:
            q, k = turned(q), turned(k)
        k, v = k.repeat_interleave(H // K, dim=2), v.repeat_interleave(H // K, dim=2)
        mixed = torch.zeros_like(q)
        for t in range(T):  # a position sees itself and those before it
            scores = ((q[:, t, None] * k[:, : t + 1]).sum(-1) / math.sqrt(D)).exp()  # (B, t + 1, H)
            shares = scores / scores.sum(1, keepdim=True)
            mixed[:, t] = (shares[..., None] * v[:, : t + 1]).sum(1)
        x = x + linear(mixed.flatten(2), f"{name}attention.out_proj")
        y = norm(x, f"{name}mlp_norm")
        if is_llama:
            gate, up = linear(y, f"{name}mlp.gate_up").chunk(2, dim=-1)
            x = x + linear(gate / (1 + (-gate).exp()) * up, f"{name}mlp.down")
        else:
            y = linear(y, f"{name}mlp.0")
            y = 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())
            x = x + linear(y, f"{name}mlp.2")
    head = weights.get("head.weight", weights["token_embedding.weight"])
    return norm(x, "final_norm") @ head.T


def check_causality(bench: Bench) -> str:
    """Whether a position's logits depend on tokens behind it, with every kernel."""
    changed_at = 70
    for name, model in bench.models():
        ids = bench.tokens(2, LONG)
        others = ids.clone()
        others[:, changed_at:] = (ids[:, changed_at:] + 1) % VOCABULARY
        for kernel in (None, *ATTENTIONS):
            for block in model.blocks:
                block.attention.kernel = kernel
            with torch.set_grad_enabled(kernel is not None), bench.precision.autocast():
                change = (model(ids) - model(others)).detach().float().abs().amax(-1)  # (B, T)
            what = f"{name} with {kernel or 'the usual'} attention"
            if (early := change[:, :changed_at].max().item()) > 1e-6:
                raise Failed(
                    f"in {what} a position sees what comes behind it: its logits change by "
                    f"{early:.2g}"
                )
            if not change[:, changed_at:].min() > 0:
                raise Failed(f"in {what} a position does not see itself")
    return "no position sees what comes behind it"


def check_initial_loss(bench: Bench) -> str:
    """The loss of models with fresh weights: that of a guess among all tokens."""
    expected, found = math.log(VOCABULARY), []
    for name, config in SHAPES.items():
        torch.manual_seed(1)
        model = GPTModel(config).to(bench.device)
        with torch.no_grad(), bench.precision.autocast():
            loss = model(bench.tokens(16, CONTEXT), bench.tokens(16, CONTEXT, seed=3)).item()
        if not abs(loss - expected) <= INITIAL_ALLOWED:
            raise Failed(f"{name} begins with a loss of {loss:.3f}; ln({VOCABULARY}) is expected")
        found.append(f"{loss:.3f}")
    return f"{' and '.join(found)}; ln({VOCABULARY}) is {expected:.3f}"


def check_accumulation(bench: Bench) -> str:
    """The gradients of seven windows in four micro-batches against those of one batch."""
    worst = 0.0
    ids, targets = bench.tokens(7, CONTEXT), bench.tokens(7, CONTEXT, seed=3)
    step = Step([(ids, targets)], targets.numel(), len(ids))
    for name, model in bench.models():
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        gradients, losses = [], []
        for micro_batch in (0, 2):
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(before[n])
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            loss, _ = bench.learner(model, optimizer, micro_batch).step(step, 0.0)
            moved = [(before[n] - p.detach()).flatten() for n, p in model.named_parameters()]
            gradients.append(torch.cat(moved).double().cpu())
            losses.append(loss.item())
        what = f"the gradients of {name} in micro-batches"
        worst = max(worst, _off_by(gradients[1], gradients[0], what, bench.allowed))
        if not abs(losses[1] - losses[0]) <= bench.allowed:
            raise Failed(f"the loss of {name} is {losses[1]:.4f} in parts, {losses[0]:.4f} at once")
    return f"micro-batches give the batch's gradients, off by {worst:.1g} of their spread"


def check_cache(bench: Bench) -> str:
    """The probabilities of tokens that are drawn with the KV cache against those without it.

    Twice: the second request may find what the first one has left. The texts differ in length.
    """
    worst = 0.0
    for name, model in bench.models():
        for seed in (4, 5):
            prompts = [bench.tokens(n, seed=seed + n).tolist() for n in (3, 9, 5)]
            texts, logprobs = [list(prompt) for prompt in prompts], list[list[float]]([[], [], []])
            generator = torch.Generator(bench.device).manual_seed(seed)
            with bench.precision.autocast():
                drawn = list(stream(model, prompts, max_new_tokens=16, generator=generator))
            for tokens in drawn:
                for row, token in enumerate(tokens):
                    assert token is not None, "no token ends a text here"
                    texts[row].append(token.id)
                    logprobs[row].append(token.logprob)
            for prompt, text, found in zip(prompts, texts, logprobs, strict=True):
                with torch.no_grad(), bench.precision.autocast():
                    logits = model(torch.tensor([text[:-1]], device=bench.device))[0].double().cpu()
                of_drawn = logits[range(len(text) - 1), text[1:]] - logits.exp().sum(-1).log()
                what = f"the log-probabilities of {name} with its cache"
                expected = of_drawn[len(prompt) - 1 :]
                worst = max(worst, _off_by(torch.tensor(found), expected, what, bench.allowed))
    return f"the KV cache changes no probability, but for rounding: {worst:.1g} of the spread"


def check_overfit(bench: Bench) -> str:
    """Whether each architecture learns one batch by heart."""
    found = []
    ids = bench.tokens(4, CONTEXT + 1)
    step = Step([(ids[:, :-1], ids[:, 1:])], 4 * CONTEXT, 4)
    for name, config in SHAPES.items():
        torch.manual_seed(1)
        model = GPTModel(config).to(bench.device)
        learner = bench.learner(model, build_optimizer("adamw", model, 1e-2, 0.0))
        for _ in range(OVERFIT_STEPS):
            loss, _ = learner.step(step, 1.0)
        if not loss.item() < OVERFIT_LOSS:
            raise Failed(
                f"after {OVERFIT_STEPS} steps on one batch {name} has a loss of {loss:.3f}; below "
                f"{OVERFIT_LOSS} is expected"
            )
        found.append(f"{loss:.3f}")
    return f"one batch is learnt by heart: loss {' and '.join(found)} after {OVERFIT_STEPS} steps"


def check_saving(bench: Bench) -> str:
    """A checkpoint, written and read back: weights, optimizer and random generators, every bit."""
    ids, targets = bench.tokens(4, CONTEXT), bench.tokens(4, CONTEXT, seed=3)
    step = Step([(ids, targets)], targets.numel(), 4)
    n_tensors = 0
    for name, model in bench.models():
        optimizer = build_optimizer("adamw", model, 1e-3, 0.1)
        for _ in range(2):
            bench.learner(model, optimizer).step(step, 1.0)
        with tempfile.TemporaryDirectory(prefix="selfcheck-") as folder:
            store = CheckpointStore(Path(folder), "selfcheck", keep=1)
            store.save(2, model, optimizer, {"random": random_state(bench.device)}, None)
            drawn = torch.rand(8, device=bench.device)
            torch.manual_seed(7)
            other = GPTModel(SHAPES[name]).to(bench.device)
            other_optimizer = build_optimizer("adamw", other, 1e-3, 0.1)
            found = store.restore(other, other_optimizer)
        if found is None:
            raise Failed(f"the checkpoint of {name} was not found again")
        set_random_state(found[0]["random"], bench.device)
        if not torch.equal(torch.rand(8, device=bench.device), drawn):
            raise Failed("the random generator does not go on where it was")
        expected = weights_of(model) | optimizer_tensors(model, optimizer)
        loaded = weights_of(other) | optimizer_tensors(other, other_optimizer)
        for key, tensor in expected.items():
            if key not in loaded or not torch.equal(loaded[key].cpu(), tensor.cpu()):
                raise Failed(f"{key} of {name} is another one after it was saved and loaded")
        n_tensors += len(expected)
    return f"{n_tensors} tensors and the random generators come back bit for bit"


# main.py with a cache of the check's own
RUN = """
import sys
from pathlib import Path
from typing import Any
import main, storage.cache
storage.cache.CACHE = Path("cache").resolve()
sys.exit(main.main(["settings.py"]))
"""


def check_resume(bench: Bench) -> str:
    """A real run, killed and started again, against one that nobody disturbed.

    On a CPU every bit of weights, optimizer and losses must be the same; on a GPU, whose results
    differ between two undisturbed runs too, the losses must be close.
    """
    with tempfile.TemporaryDirectory(prefix="selfcheck-") as name:
        folder = Path(name)
        words = random.Random(1)
        text = " ".join(words.choice(("river", "bell", "dawn", "ferry")) for _ in range(2000))
        (folder / "text.txt").write_text(text, encoding="utf-8")
        runs = [folder / "runs" / run for run in ("whole", "killed")]
        _run_to_the_end(bench, folder, "whole")
        killed_at = _run_until_killed(bench, folder, "killed", runs[1])
        _run_to_the_end(bench, folder, "killed")
        whole, killed = (_losses_of(run) for run in runs)
        if bench.device.type != "cpu":
            worst = max((abs(a - b) for a, b in zip(whole, killed, strict=True)), default=0.0)
            if not worst <= bench.allowed:
                raise Failed(f"after a kill the losses differ by {worst:.2g}")
            return f"a run killed after step {killed_at} goes on: losses differ by {worst:.1g}"
        for file in ("model.safetensors", "optimizer.safetensors"):
            one, other = (
                read_safetensors(run / "checkpoints" / f"step-{RUN_STEPS:08d}" / file)
                for run in runs
            )
            odd = [key for key in one if not torch.equal(one[key], other[key])]
            if odd:
                raise Failed(
                    f"after a kill after step {killed_at} and a restart {len(odd)} of {len(one)} "
                    f"tensors in {file} have other bits than without"
                )
        if whole != killed:
            raise Failed("after a kill and a restart the losses are not those without")
    return f"a run killed after step {killed_at} of {RUN_STEPS} ends with the same bits"


def _write_settings(bench: Bench, folder: Path, run: str) -> None:
    params = {
        "max_steps": RUN_STEPS,
        "save_every": 1,
        "batch_size": 4,
        "max_length": 16,
        "eval_freq": RUN_STEPS,
        "eval_iter": 1,
        "start_context": "river",
        # dropout draws random numbers, whose generator a checkpoint keeps
        "model_overrides": {"emb_dim": 16, "n_heads": 2, "n_layers": 1, "drop_rate": 0.1},
    }
    values = {
        "DATA": "text.txt",
        "TOKENIZER": "char",
        "CUSTOM_MODE": True,
        "RUN_NAME": run,
        "DEVICE": str(bench.device),
        "PRECISION": bench.precision.name,
        "COMPILE": False,
        "custom_params": params,
        "sampling_params": {"max_new_tokens": 4},
    }
    lines = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    (folder / "settings.py").write_text(lines, encoding="utf-8")


def _start(bench: Bench, folder: Path, run: str) -> subprocess.Popen:
    _write_settings(bench, folder, run)
    with open(folder / f"{run}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{RUN}"],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads only wait for each other here
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _run_to_the_end(bench: Bench, folder: Path, run: str) -> None:
    process = _start(bench, folder, run)
    try:
        code = process.wait(MOST_RUN_S)
    except subprocess.TimeoutExpired:
        raise Failed(f"a tiny run did not end within {MOST_RUN_S:.0f} s") from None
    finally:
        _end(process)
    if code != 0:
        raise Failed(f"a tiny run ended with exit code {code}: {_last_line(folder, run)}")


def _run_until_killed(bench: Bench, folder: Path, run: str, path: Path) -> int:
    """Start a run and kill it when it has saved some checkpoints; returns the newest one's step."""
    process, until = _start(bench, folder, run), time.monotonic() + MOST_RUN_S
    try:
        while (step := _newest_step(path)) < KILL_AT:
            if process.poll() is not None:
                raise Failed(f"a tiny run ended early: {_last_line(folder, run)}")
            if time.monotonic() > until:
                raise Failed(f"a tiny run made no {KILL_AT} steps within {MOST_RUN_S:.0f} s")
            time.sleep(0.002)
    finally:
        _end(process)
    if (path / "summary.json").exists():
        raise Failed("the run ended before it could be killed: start the check again")
    return step


def _end(process: subprocess.Popen) -> None:
    """Kill a process, at once and without a chance to save, and wait for its end."""
    process.kill()
    process.wait()


def _newest_step(run: Path) -> int:
    return max((int(p.name[5:]) for p in (run / "checkpoints").glob("step-*")), default=0)


def _last_line(folder: Path, run: str) -> str:
    lines = (folder / f"{run}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _losses_of(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def check_speed(bench: Bench) -> str:
    """Training steps' operations a second beside those of plain products on the same machine.

    On a CPU it is one thread's own time that counts, so that other programs don't. What is usual
    on GPUs is not known, so there the figures stand alone.
    """
    device, is_cpu = bench.device, bench.device.type == "cpu"
    width, layers, windows, context = (256, 4, 4, 128) if is_cpu else (768, 12, 16, 512)
    config = GPTConfig(
        vocab_size=1024,
        context_length=context,
        emb_dim=width,
        n_heads=width // 64,
        n_layers=layers,
        architecture="llama",
    )
    torch.manual_seed(1)
    model = GPTModel(config).to(device)
    learner = bench.learner(model, build_optimizer("adamw", model, 1e-3, 0.1))
    ids = torch.randint(1024, (windows, context + 1)).to(device)
    step = Step([(ids[:, :-1], ids[:, 1:])], windows * context, windows)
    size = 1024 if is_cpu else 8192
    matrix = nn.Linear(size, size, bias=False, device=device, dtype=DTYPES[bench.precision.name])
    x = torch.randn(size, size, device=device, dtype=matrix.weight.dtype)

    @torch.no_grad()
    def multiply() -> None:
        matrix(x)

    step_s, product_s = _fastest_s(device, [lambda: learner.step(step, 1.0), multiply])
    rate, product_rate = (
        model.flop_per_token() * windows * context / step_s / 1e9,
        2 * size**3 / product_s / 1e9,
    )
    said = f"{rate:,.0f} GFLOP/s in training steps{' on a core' * is_cpu}, "
    said += f"{rate / product_rate:.0%} of plain products' {product_rate:,.0f}"
    if not is_cpu:
        return said
    said += "; usual are {:.0%} to {:.0%}".format(*USUAL_SHARE)
    if rate < LEAST_SHARE * product_rate:
        raise Failed(said)
    return said


def _fastest_s(device: torch.device, jobs: list[Callable[[], object]]) -> list[float]:
    """The fewest seconds that each job took, in turn over some rounds, after one to warm up."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    fastest, until = [math.inf] * len(jobs), time.perf_counter() + MOST_TIMING_S
    with using_threads(1):
        for number in range(6):
            if number > 1 and time.perf_counter() > until:
                break
            for i, job in enumerate(jobs):
                synchronize(device)
                started_at = clock()
                job()
                synchronize(device)
                if number > 0:
                    fastest[i] = min(fastest[i], clock() - started_at)
    return fastest


CHECKS: dict[str, Callable[[Bench], str]] = {
    "logits": check_logits,
    "causality": check_causality,
    "initial loss": check_initial_loss,
    "accumulation": check_accumulation,
    "KV cache": check_cache,
    "overfitting": check_overfit,
    "saving": check_saving,
    "kill and resume": check_resume,
    "speed": check_speed,
}
