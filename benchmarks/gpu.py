"""A GPU in nine minutes: is it right, does it wait, how fast is it; each stage with its own limit.

    python -m benchmarks.gpu [--only STAGE ...] [--rehearse]

Needs torch, numpy, tiktoken and safetensors, and no file beside the repository. Each stage is a
process of its own, so that one that fails or hangs costs only itself; what it found is written at
once, to benchmarks/results/. --rehearse goes through all of it on the CPU with tiny sizes and
writes nothing. The exit code is 1 if a stage failed.
"""

import argparse
import contextlib
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import machine, write_results
from benchmarks.steps import bf16_peak, prepare_step
from engine.compiling import compile_decoding, compile_model, undo_compiling
from engine.console import say, use_utf8
from engine.memory import estimate_memory
from engine.optim import build_adamw
from engine.precision import Precision, choose_precision
from environment import pick_device
from generation import generate
from model import GPTConfig, GPTModel
from planning.agreement import AGREEMENT, disagreements
from training.learner import take_step

REPOSITORY = Path(__file__).resolve().parent.parent
LIMITS = {  # seconds; together nine minutes
    "machine": 15,
    "agreement": 50,
    "waits": 40,
    "graphs": 60,
    "runs": 90,
    "speed": 170,
    "writing": 60,
    "memory": 30,
    "ranks": 25,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"architecture": "llama", "qk_norm": True},
    "grouped": {"architecture": "llama", "n_kv_heads": 2},
}
TINY = {"context_length": 32, "emb_dim": 32, "n_heads": 4, "n_layers": 2}
SMALL = {"context_length": 256, "emb_dim": 384, "n_heads": 6, "n_layers": 6}
GPT2_124M = {"context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12}
VOCABULARY = 50257


class Stages:
    """The stages, each a method that returns what it found, or raises."""

    def __init__(self, device: torch.device, *, rehearse: bool) -> None:
        self.device, self.rehearse = device, rehearse
        self.precision = choose_precision("auto", device)

    def _config(self, shape: dict[str, Any], **changes: Any) -> GPTConfig:
        """A configuration of this shape, a tiny one in a rehearsal."""
        sizes = TINY if self.rehearse else shape
        vocab_size = 101 if self.rehearse else VOCABULARY
        return GPTConfig(**{"vocab_size": vocab_size} | sizes | changes)

    def _batch(self, config: GPTConfig, n_windows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (2 if self.rehearse else n_windows, config.context_length + 1)
        ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        return ids[:, :-1].to(self.device), ids[:, 1:].to(self.device)

    def machine(self) -> dict[str, Any]:
        """What nvidia-smi and torch say of the device."""
        program = shutil.which("nvidia-smi")
        said = subprocess.run([program], capture_output=True, text=True).stdout if program else ""
        return machine(self.device) | {"precision": self.precision.name, "nvidia_smi": said}

    def agreement(self) -> dict[str, Any]:
        """Loss, gradients and decoding against the CPU's fp32, by architecture and precision."""
        names = ["fp32"] if self.device.type == "cpu" else ["fp32", "bf16", "fp16"]
        found = {}
        for shape, changes in SHAPES.items():
            config = self._config(SMALL, **changes | ({"n_heads": 4} if shape == "grouped" else {}))
            torch.manual_seed(0)
            model = GPTModel(config).to(self.device)
            for name in names:
                precision = Precision(name, "", self.device.type)
                errors = disagreements(model, *self._batch(config, 2), precision)
                found[f"{shape} {name}"] = errors
                if max(errors.values()) > AGREEMENT[name]:
                    raise AssertionError(f"{shape} in {name}: {errors}")
        return found

    def waits(self) -> dict[str, Any]:
        """Training steps under torch's check for synchronizations, which raises at the first."""
        config = self._config(SMALL)
        model, step = prepare_step(config, self.device, self.precision)
        batch = self._batch(config, 8)
        step(*batch)
        with self._no_waiting():
            for _ in range(20):
                step(*batch)
        return {"steps": 20, "parameters": model.count_parameters()}

    @contextlib.contextmanager
    def _no_waiting(self):
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    def graphs(self) -> dict[str, Any]:
        """Gradients of compiled steps against eager ones, with one and two micro-batches."""
        config, found = self._config(SMALL), {}
        torch.manual_seed(0)
        model = GPTModel(config).to(self.device)
        batches = [self._batch(config, 4)] * 2
        for count in (1, 2):
            eager = self._gradients(model, batches[:count])
            compile_model(model, self.device, micro_batches=count)
            for _ in range(3):  # warm-up, recording, replay
                compiled = self._gradients(model, batches[:count])
            undo_compiling(model)
            pairs = list(zip(compiled, eager, strict=True))
            worst = max(((a - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in pairs)
            found[f"{count} micro-batches"] = worst
            if worst > AGREEMENT[self.precision.name]:
                raise AssertionError(f"compiled gradients differ: {found}")
        return found

    def _gradients(self, model: GPTModel, batches: list) -> list[torch.Tensor]:
        """The gradients that a step's backward passes leave, before they are used."""
        optimizer = build_adamw(model, 0.0, 0.0)
        seen: list[torch.Tensor] = []
        hook = optimizer.register_step_pre_hook(
            lambda *_: seen.extend(p.grad.clone() for p in model.parameters())
        )
        take_step(model, batches, optimizer, self.precision, 0.0)
        hook.remove()
        return seen

    def runs(self) -> dict[str, Any]:
        """main.py in each precision and with Muon; the first run is stopped and resumed."""
        names = ["auto", "fp32"] + ["fp16"] * (self.device.type == "cuda")
        cases = [(name, "adamw") for name in names] + [("auto", "muon")]
        found = {}
        for number, (precision, optimizer) in enumerate(cases):
            training = {"max_steps": 20, "batch_size": 4, "optimizer": optimizer}
            with tempfile.TemporaryDirectory() as folder:
                settings = {"PRECISION": precision, "custom_params": training}
                command = self._command(Path(folder), settings)
                codes = [self._stopped(command, folder)] if number == 0 else []
                codes.append(self._run(command, folder)[0])
                file = Path(folder, "runs", "run", "metrics.jsonl")
                rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            found[f"{precision} {optimizer}"] = {"exit_codes": codes, "last": rows[-1]}
            if max(row["step"] for row in rows) != training["max_steps"]:
                raise AssertionError(f"a run ended early: {found}")
        return found

    def _command(self, folder: Path, settings: dict[str, Any], *launcher: str) -> list[str]:
        """The command that trains a run "run" with these settings in a folder."""
        text = str(REPOSITORY / "corpus" / "sample-en.txt")
        settings = {
            "DATA": text,
            "TOKENIZER": "char",
            "MODEL": "small" if self.rehearse else "mini",
            "CUSTOM_MODE": True,
            "DEVICE": self.device.type,
            "RUN_NAME": "run",
        } | settings
        lines = "".join(f"{name} = {value!r}\n" for name, value in settings.items())
        (folder / "settings.py").write_text(lines, encoding="utf-8")
        return [sys.executable, *launcher, str(REPOSITORY / "main.py"), "settings.py"]

    def _stopped(self, command: list[str], folder: str) -> int:
        """The exit code of a run that is told to stop once it trains."""
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        metrics = Path(folder, "runs", "run", "metrics.jsonl")
        while process.poll() is None and not metrics.exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        return process.wait()

    def _run(self, command: list[str], folder: str) -> tuple[int, list[str]]:
        """The exit code and the lines of a run; AssertionError with its output if it failed."""
        done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
        if done.returncode not in (0, 8):  # 8: a run that has ended before
            raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.returncode, done.stdout.splitlines()

    def speed(self) -> dict[str, Any]:
        """Steps of the 124M model on 64 x 1024 tokens, eager and compiled, and their memory."""
        found: dict[str, Any] = {}
        for compiled in (False, True):
            config = self._config(GPT2_124M)
            model, step = prepare_step(config, self.device, self.precision, compiled=compiled)
            batch = self._batch(config, 64)
            times = [self._timed(lambda: step(*batch)) for _ in range(8)]  # noqa: B023
            seconds = statistics.median(times[3:])
            flop = batch[0].numel() * model.flop_per_token() / seconds
            peak = bf16_peak(machine(self.device)["name"])
            found["compiled" if compiled else "eager"] = {
                "seconds": times,
                "tokens_per_s": batch[0].numel() / seconds,
                "share_of_peak": peak and flop / peak,
            } | self._memory(model, config, len(batch[0]))
            if compiled:
                found["profile"] = self._profile(lambda: step(*batch))  # noqa: B023
        return found

    def _memory(self, model: GPTModel, config: GPTConfig, n_windows: int) -> dict[str, Any]:
        if self.device.type != "cuda":
            return {}
        peak = torch.cuda.max_memory_allocated(self.device)
        estimate = estimate_memory(
            model,
            n_tokens=config.context_length,
            n_windows=n_windows,
            precision=self.precision,
            device=self.device,
            accumulates=False,
        )
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"peak_bytes": peak, "estimated_bytes": estimate.total(n_windows)}

    def _timed(self, work: Callable[[], object]) -> float:
        started_at = time.perf_counter()
        work()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started_at

    def _profile(self, work: Callable[[], object]) -> str:
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU] + [kinds.CUDA] * (self.device.type == "cuda")
        with torch.profiler.profile(activities=activities) as profiler:
            self._timed(work)
        order = "cuda_time_total" if self.device.type == "cuda" else "cpu_time_total"
        return profiler.key_averages().table(sort_by=order, row_limit=25)

    def writing(self) -> dict[str, Any]:
        """Tokens a second, recorded and compiled, of one text and of eight, twice each."""
        config = self._config(GPT2_124M)
        torch.manual_seed(0)
        model, found = GPTModel(config).to(self.device).eval(), {}
        ways = ["recorded", "compiled"] if self.device.type == "cuda" else ["eager"]
        for way in ways:
            if way == "compiled":
                compile_decoding(model, self.device)
            for rows in (1, 8):
                for count in (4,) if self.rehearse else (20, 500):
                    prompts = [[1] * 8] * rows
                    times = [
                        self._timed(lambda: generate(model, prompts, max_new_tokens=count))  # noqa: B023
                        for _ in range(2)
                    ]
                    speeds = [rows * count / seconds for seconds in times]
                    found[f"{way}, {rows} rows, {count} tokens"] = speeds
        return found

    def memory(self) -> dict[str, Any]:
        """A batch that may not fit goes in halves; NIGHT_MODE leaves half of the memory."""
        training = {"batch_size": 8 if self.rehearse else 4096, "max_steps": 2, "stride": 1}
        with tempfile.TemporaryDirectory() as folder:
            settings = {"NIGHT_MODE": True, "custom_params": training | {"eval_iter": 1}}
            _, lines = self._run(self._command(Path(folder), settings), folder)
        return {"notices": [line for line in lines if "at a time instead" in line]}

    def ranks(self) -> dict[str, Any]:
        """A run of one rank under torchrun, replicated and sharded, over NCCL on a GPU."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        found = {}
        for kind in ("ddp", "fsdp"):
            with tempfile.TemporaryDirectory() as folder:
                settings = {"PARALLEL": kind, "custom_params": {"max_steps": 4, "eval_iter": 1}}
                found[kind] = self._run(self._command(Path(folder), settings, *launcher), folder)
        return found


def main(arguments: list[str]) -> int:
    """Run the stages, print and write what they found; 1 if one failed."""
    use_utf8()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="STAGE")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--stage", choices=LIMITS, help=argparse.SUPPRESS)  # of the child
    asked = parser.parse_args(arguments)
    device = pick_device("cpu" if asked.rehearse else None)
    if asked.stage is not None:
        stages = Stages(device, rehearse=asked.rehearse)
        say(json.dumps(getattr(stages, asked.stage)()))
        return 0
    results: dict[str, Any] = {"machine": machine(device), "rehearsed": asked.rehearse}
    failed = []
    for name in asked.only:
        started_at = time.perf_counter()
        results[name] = run_stage(name, rehearse=asked.rehearse)
        if "error" in results[name]:
            failed.append(name)
        taken = time.perf_counter() - started_at
        say(f"{name:10} {taken:4.0f} s  {json.dumps(results[name])[:150]}")
        if not asked.rehearse:
            path = write_results("gpu", device, results)
            say(f"           written to {path}")
    say(f"failed: {', '.join(failed)}" if failed else "every stage is right")
    return int(bool(failed))


def run_stage(name: str, *, rehearse: bool) -> dict[str, Any]:
    """What a stage found, or its error, by a process that ends at its limit."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name]
    command += ["--rehearse"] * rehearse
    limit = LIMITS[name] * (4 if rehearse else 1)  # two busy cores are no GPU
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {limit} s"}
    if done.returncode != 0:
        return {"error": done.stderr[-3000:]}
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
