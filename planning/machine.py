"""How a run uses this machine: device, precision, threads, micro-batch; and torch's GPU builds."""

import dataclasses
import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from data import WindowPlan, to_device
from distributed.parallel import ALONE, Parallel
from distributed.sharding import build_in_parts, whole
from engine.attention import ATTENTIONS, attention_step, usual_attention
from engine.console import say
from engine.devices import (
    INDEXED,
    KINDS,
    cuda_capability,
    device_count,
    device_name,
    find_device_fault,
    limit_memory,
    with_index,
)
from engine.errors import ResourceError, SettingsError, first_line, is_out_of_memory
from engine.main_guard import require_main_guard
from engine.memory import (
    ADVICE,
    as_bytes,
    available_memory,
    count_trained,
    estimate_memory,
    halved,
)
from engine.precision import DTYPES, Precision, choose_precision, keep_precision, may_be_slow
from engine.processor import default_threads, threads_are_set
from engine.settings import shown
from engine.trials import mlp_step
from model import GPTConfig, GPTModel, attention_kernel
from planning.agreement import precision_that_agrees
from planning.choices import WORTH_A_TRIAL, Choices
from planning.decisions import RunRecord
from planning.plan import RunPlan
from planning.recipe import MOST_BEST_BYTES
from training_utils import TrainingConfig

LONGEST_TRIAL = 1024  # positions in a trial of attention
TORCH = "2.13.0"  # as requirements.txt pins it
WHEELS = "https://download.pytorch.org/whl"
# builds of that version: the driver that each needs, and the compute capabilities it supports
CU130, CU130_DRIVER, CU130_CAPABILITY = "cu130", 580, (7, 5)
CU126, CU126_DRIVER, CU126_CAPABILITY, CU126_BELOW = "cu126", 525, (5, 0), (10, 0)


@dataclass(frozen=True)
class Machine:
    """How a run uses the machine."""

    device: torch.device
    parallel: Parallel
    precision: Precision
    threads: int = 1
    workers: int = 0  # of each loader
    micro_batch: int = 1  # the most windows of a forward pass
    memory: int = 0  # bytes that training takes; 0 before it is estimated
    choices: Choices | None = None  # what was measured here
    is_shared: bool = False  # with NIGHT_MODE: half of the threads, or of a GPU's memory
    notices: tuple[str, ...] = ()  # of what differs from the settings

    def but(self, *notices: str, **changes: Any) -> "Machine":
        """A copy with some changes, and notices of them."""
        return dataclasses.replace(self, notices=self.notices + notices, **changes)

    def computing_in(self, precision: Precision) -> "Machine":
        """A copy with a precision, and a notice if it differs."""
        if precision.name == self.precision.name:
            return self
        return self.but(f"precision is {precision.name}: {precision.reason}", precision=precision)


def find_machine(plan: RunPlan, cache: Path, parallel: Parallel = ALONE) -> Machine:
    """The device and precision of a new run; raises as pick_device() and choose_precision() do."""
    device = pick_device(plan.run.DEVICE, parallel)
    precision = choose_precision(plan.run.PRECISION, device)
    parallel.require_same(device=device.type)
    if device.type != "cpu":
        limit_memory(device, 1.0)  # an earlier run of this process may have had NIGHT_MODE
    night = plan.run.NIGHT_MODE
    choices = Choices(cache, device, _threads_for(night, device, parallel))
    if plan.run.PRECISION == "auto" and may_be_slow(precision):
        precision = parallel.from_main(lambda: _faster_precision(precision, choices))
    return Machine(device, parallel, precision, choices=choices, is_shared=night)


def _faster_precision(precision: Precision, choices: Choices) -> Precision:
    """The given precision, or fp32 where its matrix products are clearly faster."""
    tried = [precision, Precision("fp32", "", precision.device_type)]
    choice = choices.fastest(
        f"{precision.name} or fp32", {p.name: mlp_step(p, choices.device) for p in tried}
    )
    reason = precision.reason if choice.name == precision.name else "faster here"
    return Precision(choice.name, f"{reason}: {choice.reason}", precision.device_type)


def choose_frozen(machine: Machine) -> torch.dtype:
    """The dtype of frozen matrices: that of the run's products, which then cast nothing, or fp32
    where a trial finds that clearly faster. The numbers are the same. Collective."""
    precision, choices = machine.precision, machine.choices
    if precision.name == "fp32":
        return torch.float32
    assert choices is not None, "find_machine() sets it"
    dtypes = {name: DTYPES[name] for name in (precision.name, "fp32")}
    steps = {n: mlp_step(precision, choices.device, frozen=dtypes[n]) for n in dtypes}
    choice = machine.parallel.from_main(
        lambda: choices.fastest(f"frozen weights of products in {precision.name}", steps)
    )
    say(f"Frozen weights: {choice.name} ({choice.reason})")
    return dtypes[choice.name]


def set_attention(
    model: GPTModel,
    machine: Machine,
    plan: RunPlan,
    asked: TrainingConfig,
    windows: WindowPlan,
    before: RunRecord | None,
) -> None:
    """Set the kernel of a CPU's attention in the model, by a trial if the run is long enough.

    A resumed run keeps its own. Collective.
    """
    config, dtype = model.config, DTYPES[machine.precision.name]
    kernel = usual_attention(dtype)
    if before is not None:
        kernel = before.attention
    elif machine.device.type == "cpu" and _is_worth_a_trial(plan, asked, windows, model):
        kernel = _faster_attention(config, kernel, machine)
    for block in model.blocks:
        block.attention.kernel = kernel


def _is_worth_a_trial(
    plan: RunPlan, asked: TrainingConfig, windows: WindowPlan, model: GPTModel
) -> bool:
    """Whether a run has a choice of attention kernels and is long enough to time them."""
    if model.config.attention_drop_rate > 0:
        return False
    if asked.time_budget_minutes is not None and asked.max_steps is None:
        return True
    step_size = windows.batch_size * asked.gradient_accumulation_steps
    steps = plan.count_steps(asked, -(-windows.n_windows // step_size))
    tokens = steps * step_size * windows.max_length
    return tokens * model.flop_per_token() >= WORTH_A_TRIAL


def _faster_attention(config: GPTConfig, usual: str, machine: Machine) -> str:
    """The kernel that is faster in attention_step(), on the main rank; tells it."""
    choices, name = machine.choices, machine.precision.name
    assert choices is not None, "find_machine() sets it"
    assert config.n_kv_heads and config.head_dim, "GPTConfig has replaced them"
    T = min(config.context_length, LONGEST_TRIAL)
    shape = config.n_heads, config.n_kv_heads, T, config.head_dim
    sizes = " x ".join(map(str, shape))
    kernels = sorted(ATTENTIONS, key=usual.__ne__)  # the usual one first
    steps = {kernel: attention_step(shape, DTYPES[name], kernel) for kernel in kernels}
    choice = machine.parallel.from_main(
        lambda: choices.fastest(f"attention in blocks of {sizes} in {name}", steps)
    )
    say(f"Attention: {choice.name} ({choice.reason})")
    return choice.name


def pick_device(requested: str | None, parallel: Parallel = ALONE) -> torch.device:
    """The device that DEVICE names, as torch's current one; None is MPS, then CUDA, XPU, CPU.

    Each rank takes a GPU of its own. Raises SettingsError for an unknown name, ResourceError for a
    device that is missing or that the installed torch has no kernels for.
    """
    if fault := find_device_fault(requested):
        raise SettingsError(f"the device is {shown(requested)}; it {fault}, or None")
    counts = _count_devices()
    if not parallel.is_alone:
        return _device_of_rank(requested, parallel, counts["cuda"])
    if requested is None:
        requested = next(kind for kind in ("mps", "cuda", "xpu", "cpu") if counts[kind])
    kind, _, index = requested.partition(":")
    # torch.device's own index overflows above 127
    if int(index or 0) >= counts[kind]:
        raise ResourceError(_about_missing_device(requested, counts))
    return _ready(torch.device(requested))


def _count_devices() -> dict[str, int]:
    with warnings.catch_warnings():  # why_no_gpu() reports old drivers
        warnings.filterwarnings("ignore", "CUDA initialization")
        return {kind: device_count(kind) for kind in KINDS}


def _device_of_rank(requested: str | None, parallel: Parallel, n_cuda: int) -> torch.device:
    """The device of one of several ranks: a CUDA GPU of its own, or the CPU."""
    if requested not in (None, "cpu", "cuda"):
        raise SettingsError(
            f'DEVICE = "{requested}" is one device, and torchrun has started '
            f'{parallel.world} processes.\nSet DEVICE to "cuda", "cpu" or None.'
        )
    if n_cuda == 0 and requested == "cuda":
        raise ResourceError(_about_missing_device(requested, {"cpu": 1}))
    if n_cuda == 0 or requested == "cpu":
        return torch.device("cpu")
    if parallel.local_world > n_cuda:
        raise ResourceError(
            f"torchrun has started {parallel.local_world} processes here, and there are "
            f"{n_cuda} GPUs.\nStart at most one for each, by "
            '--nproc-per-node; or set DEVICE = "cpu".'
        )
    return _ready(torch.device("cuda", parallel.local_rank))


def _ready(device: torch.device) -> torch.device:
    """The device with its index, as torch's current one; ResourceError without kernels for it."""
    device = with_index(device)
    capability = cuda_capability(device)
    if capability is not None and not has_kernels(capability, torch.cuda.get_arch_list()):
        major, minor = capability
        raise ResourceError(
            f"{device_name(device)} has compute capability {major}.{minor}, and the installed "
            f"torch ({torch.__version__}) has no kernels for it.\n{_advise(capability, None)}\n"
            'Or set DEVICE = "cpu".'
        )
    if device.index is not None:
        getattr(torch, device.type).set_device(device)
    return device


def has_kernels(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether a build of torch for these architectures runs on a GPU of this capability.

    Machine code ("sm_86", "sm_90a") runs on GPUs of its major version and an equal or higher minor
    one, PTX ("compute_120") on every later GPU. An empty list refuses nothing.
    """
    for arch in arch_list:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", arch):
            built_for = int(found[2]), int(found[3])
            is_same_major = built_for[0] == capability[0]
            if built_for <= capability and (is_same_major or found[1] == "compute"):
                return True
    return not arch_list


def _about_missing_device(requested: str, counts: dict[str, int]) -> str:
    names = [
        f"{kind}:{i}" if kind in INDEXED else kind
        for kind in KINDS
        for i in range(counts.get(kind, 0))
    ]
    hint = why_no_gpu() if requested.startswith("cuda") and not counts.get("cuda") else None
    return (
        f'DEVICE = "{requested}", but this machine has no such device.\n'
        f"Available here: {', '.join(names)}; DEVICE = None takes the best."
        + (f"\n{hint}" if hint else "")
    )


def check_devices(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Iterable[torch.Tensor | None],
    device: torch.device,
) -> None:
    """Raise ResourceError unless parameters, buffers, optimizer state and a batch are on device."""
    tensors = [(f"parameter {name}", tensor) for name, tensor in model.named_parameters()]
    tensors += [(f"buffer {name}", tensor) for name, tensor in model.named_buffers()]
    tensors += [
        (f"optimizer state {name}", value)
        for state in optimizer.state.values()
        for name, value in state.items()
        # unfused AdamW keeps its 0-d step counters on the CPU
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    tensors += [(f"batch part {i}", t) for i, t in enumerate(batch) if t is not None]
    strays = [
        f"{name} is on {tensor.device}"
        for name, tensor in tensors
        # "cuda" without an index means the current one
        if tensor.device.type != device.type or device.index not in (None, tensor.device.index)
    ]
    if strays:
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        raise ResourceError(
            f"not everything is on {device}: {'; '.join(strays[:3])}{more}.\n"
            "Move the model to the device before its optimizer is built."
        )


def why_no_gpu() -> str | None:
    """Why torch can't use this machine's visible NVIDIA GPU, and what helps; None without one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None
    gpu = _ask_nvidia_smi()
    if gpu is None:
        return None
    name, driver, capability = gpu
    advice = _advise(capability, driver)
    if torch.version.cuda is None:
        return f"{name} is here, but the installed torch has no CUDA. {advice}"
    needed = CU130_DRIVER if int(torch.version.cuda.split(".")[0]) >= 13 else CU126_DRIVER
    if _major(driver) < needed:
        return (
            f"{name} has the driver {driver}, and the installed torch (CUDA {torch.version.cuda}) "
            f"needs {needed} or newer. {advice}"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{name} is here, but CUDA does not start: {first_line(error)[:200]}"
    return None


def pip_line(build: str) -> str:
    """The command that installs this build of the torch that requirements.txt pins."""
    return f'pip install "torch=={TORCH}+{build}" --index-url {WHEELS}/{build}'


def _advise(capability: tuple[int, ...] | None, driver: str | None) -> str:
    """What makes a GPU usable: a build of torch for it, or a newer driver; None is unknown."""
    capability = capability or CU130_CAPABILITY
    if capability < CU126_CAPABILITY:
        return "No recent torch serves a GPU this old."
    if capability >= CU130_CAPABILITY and _major(driver) >= CU130_DRIVER:
        return f"This torch serves it: {pip_line(CU130)}"
    build, needed = (CU126, CU126_DRIVER) if capability < CU126_BELOW else (CU130, CU130_DRIVER)
    if _major(driver) >= needed:
        return f"This torch serves it: {pip_line(build)}"
    return f"Update the driver to {needed} or newer, then: {pip_line(build)}"


def _ask_nvidia_smi() -> tuple[str, str, tuple[int, ...] | None] | None:
    """Name, driver and compute capability of the first NVIDIA GPU; None if there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    # drivers before 510 don't report the capability
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):
        try:
            done = subprocess.run(
                [program, f"--query-gpu={fields}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
        if done.returncode == 0 and len(values) == fields.count(",") + 1:
            found = re.fullmatch(r"(\d+)\.(\d+)", values[2]) if len(values) == 3 else None
            return values[0], values[1], found and (int(found[1]), int(found[2]))
    return None


def _major(driver: str | None) -> int:
    """The number before the first dot of a driver's version; an unknown one counts as recent."""
    digits = (driver or "").partition(".")[0]
    return int(digits) if digits.isdecimal() else CU130_DRIVER


def build_model(config: GPTConfig, device: torch.device) -> GPTModel:
    """A model with initial weights on a device; ResourceError if it does not fit."""
    try:
        return GPTModel(config).to(device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"the model does not fit into the memory of {device}.\n"
            "Set smaller n_layers or emb_dim in model_overrides, or another MODEL."
        ) from error


def fresh_model(
    plan: RunPlan, asked: TrainingConfig, windows: WindowPlan, vocab_size: int, machine: Machine
) -> GPTModel:
    """The run's model, initialized by its seed; ResourceError if it is too large to train here."""
    device, parallel = machine.device, machine.parallel
    sizes = {"context_length": windows.max_length, "vocab_size": vocab_size}
    config = GPTConfig(**plan.model | sizes)
    torch.manual_seed(plan.run.SEED)
    _require_memory_for(config, machine, is_frozen=asked.lora_rank is not None)
    if parallel.kind == "fsdp":
        model = build_in_parts(lambda: GPTModel(config), parallel, machine.precision, device)
    else:
        model = build_model(config, device)
    parallel.seed_apart(plan.run.SEED)
    model.activation_checkpointing = asked.activation_checkpointing
    return model


def _require_memory_for(config: GPTConfig, machine: Machine, *, is_frozen: bool) -> None:
    """Raise ResourceError for matrices beyond memory: overcommit would end in a killed process."""
    assert config.ff_dim and config.head_dim  # GPTConfig computes them
    n_matrices = 1 if config.tie_embeddings else 2
    least = n_matrices * config.vocab_size * config.emb_dim
    width = config.n_heads * config.head_dim
    least += config.n_layers * 2 * config.emb_dim * (width + config.ff_dim)
    # fp32 weights, gradients and one moment; of frozen ones the copy that is read from the file
    needed = least * 4 * (2 if is_frozen else 3)
    if machine.parallel.kind == "fsdp":
        # an evaluation unshards all weights, in the run's precision
        needed = needed // machine.parallel.world + least * DTYPES[machine.precision.name].itemsize
    room = available_memory(machine.device)
    if room is not None and needed > room:
        raise ResourceError(
            f"training this model takes more than {as_bytes(needed)} of memory, and "
            f"{machine.device} has {as_bytes(room)} free.\n"
            "Set a smaller n_layers or emb_dim, another MODEL, or a smaller model as INIT_FROM."
        )


def keeps_best_on_disk(model: GPTModel, device: torch.device) -> bool:
    """Whether a run on a device writes its best weights to the disk at once: a GPU's run copies
    them to the CPU's memory, which has room."""
    return device.type != "cuda" and 4 * count_trained(model) > MOST_BEST_BYTES


def fit_into_memory(
    machine: Machine, model: GPTModel, asked: TrainingConfig, windows: WindowPlan
) -> Machine:
    """The machine with a micro-batch that fits; ResourceError if no window does. Collective."""
    device, parallel, micro_batch = machine.device, machine.parallel, machine.micro_batch
    parts = parallel.world if parallel.kind == "fsdp" else 1
    share = windows.batch_size * asked.gradient_accumulation_steps // parallel.world
    in_memory = device.type != "cuda" and not keeps_best_on_disk(model, device)
    keeps_best = in_memory and parallel.is_main
    for accumulates in (micro_batch < share, True):
        with whole(model, parallel):
            estimate = estimate_memory(
                model,
                n_tokens=windows.max_length,
                n_windows=micro_batch,
                precision=machine.precision,
                device=device,
                optimizer=asked.optimizer,
                keeps_best=keeps_best,
                parts=parts,
                accumulates=accumulates or parallel.kind == "ddp",
            )
        room = available_memory(device)
        if room is not None:
            if device.type != "cuda":
                room //= parallel.local_world  # its other ranks need as much
            room += sum(p.nbytes for p in model.parameters()) // parts  # already allocated
        fitting = estimate.largest_fit(micro_batch, room)
        if parallel.lowest(fitting) == micro_batch:  # else it accumulates gradients
            break
    parts_shown = estimate.described(max(1, fitting))
    room_shown = "" if room is None else as_bytes(room)
    if fitting == 0:
        raise ResourceError(
            f"a step with a single window of {windows.max_length:,} tokens at a time takes about "
            f"{as_bytes(estimate.total(1))} of memory, and {device} has {room_shown} free:\n"
            f"{parts_shown}.\n{ADVICE}"
        )
    fitting = parallel.lowest(fitting)
    needed = estimate.total(fitting)
    of_room = f" of {room_shown} free" if room_shown else ""
    say(f"Memory: about {as_bytes(needed)}{of_room}" + f" ({parts_shown})" * (needed > 1e9))
    machine = machine.but(memory=needed)
    if fitting == micro_batch:
        return machine
    return machine.but(
        f"memory: {fitting} windows at a time instead of {micro_batch}, which would take "
        f"{as_bytes(estimate.total(micro_batch))}; the batch stays the same",
        micro_batch=fitting,
    )


def check_arithmetic(machine: Machine, model: GPTModel, loader: DataLoader) -> Machine:
    """The machine with a precision in which its GPU computes the model correctly."""
    device, precision = machine.device, machine.precision
    if device.type == "mps":  # some versions of Metal were wrong
        ids, targets, *_ = to_device(loader.dataset.__getitems__([0]), device)
        targets = targets.clamp(min=0)  # those that don't count have no token
        machine = machine.computing_in(precision_that_agrees(model, ids, targets, precision))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for fp32 matmuls
        # a wrong library on the path makes it a slow one
        kernel = attention_kernel(model.config, precision, device)
        say(f"Attention: {kernel}")
        if kernel == "math" and precision.name != "fp32":
            return machine.but("torch has no fused attention kernel for this GPU: training is slow")
    return machine


def decide_machine(
    machine: Machine,
    plan: RunPlan,
    asked: TrainingConfig,
    windows: WindowPlan,
    before: RunRecord | None,
) -> Machine:
    """The machine with precision, threads, workers and micro-batch; before is a resumed run's.

    Raises SettingsError if the ranks can't have equal shares of a step, or if workers need a main
    guard.
    """
    device, parallel, night = machine.device, machine.parallel, plan.run.NIGHT_MODE
    machine = decide_precision(machine, plan.run.PRECISION, before)
    parallel.require_same(precision=machine.precision.name)  # a resumed run's may be one for all
    most = _largest_micro_batch(asked, windows, parallel)
    micro_batch, about_memory = decide_micro_batch(night, device, most, parallel, before)
    threads, about_threads = decide_threads(night, device, parallel, before)
    workers, about_workers = decide_workers(asked.num_workers, parallel.local_world)
    require_main_guard(workers)
    notices = (*about_memory, *about_threads, *about_workers)
    return machine.but(*notices, threads=threads, workers=workers, micro_batch=micro_batch)


def decide_workers(asked: int, processes: int) -> tuple[int, list[str]]:
    """The number of a loader's workers, at most one per core; and notices."""
    cores = max(1, (os.cpu_count() or 1) // processes)
    if asked <= cores:
        return asked, []
    return cores, [f"num_workers is lowered from {asked} to {cores}: so many cores are there"]


def decide_precision(machine: Machine, requested: str, before: RunRecord | None) -> Machine:
    """The machine; for a resumed run, "auto" keeps the precision that it began with."""
    if before is None or requested != "auto":
        return machine
    return machine.computing_in(keep_precision(before.precision.name, machine.device))


def decide_threads(
    night_mode: bool, device: torch.device, parallel: Parallel, before: RunRecord | None
) -> tuple[int, list[str]]:
    """The number of threads, half of it in NIGHT_MODE on the CPU; and notices."""
    usual = default_threads(parallel.local_world)
    threads = _threads_for(night_mode, device, parallel)
    kept = _same_sharing(before, night_mode, parallel)
    if kept and not threads_are_set(parallel.local_world):
        threads = min(kept.threads, os.cpu_count() or 1)
    is_halved = night_mode and device.type == "cpu"
    return threads, [f"night mode: {threads} of {usual} threads"] if is_halved else []


def _threads_for(night_mode: bool, device: torch.device, parallel: Parallel) -> int:
    """The number of threads of a new run."""
    usual = default_threads(parallel.local_world)
    return max(1, usual // 2) if night_mode and device.type == "cpu" else usual


def decide_micro_batch(
    night_mode: bool, device: torch.device, most: int, parallel: Parallel, before: RunRecord | None
) -> tuple[int, list[str]]:
    """The micro-batch, at most `most` windows, half of it in NIGHT_MODE on a GPU; and notices."""
    micro_batch, notices = most, []
    if night_mode and device.type != "cpu":
        micro_batch = halved(most)
        memory = "half of the memory, " if limit_memory(device, 0.5) else ""
        notices.append(f"night mode: {memory}{micro_batch} windows at a time instead of {most}")
    if kept := _same_sharing(before, night_mode, parallel):
        micro_batch = min(kept.micro_batch, most)
    if noted := parallel.noted("micro_batch"):  # after a failure of this job
        micro_batch = min(micro_batch, int(noted))
    return micro_batch, notices


def _same_sharing(before: RunRecord | None, night: bool, parallel: Parallel) -> RunRecord | None:
    """The record of a resumed run, if it began with these ranks and this NIGHT_MODE."""
    if before and (before.ranks, before.settings["NIGHT_MODE"]) == (parallel.world, night):
        return before
    return None


def _largest_micro_batch(asked: TrainingConfig, windows: WindowPlan, parallel: Parallel) -> int:
    """The windows of a rank's share, at most batch_size; SettingsError for unequal shares."""
    accumulation, world = asked.gradient_accumulation_steps, parallel.world
    step_size = windows.batch_size * accumulation
    if step_size % world:
        below, above = step_size // world * world, -(-step_size // world) * world
        nearest = f"{below} or {above}" if below else f"{above}"
        raise SettingsError(
            f"a step of {step_size} windows (batch_size {windows.batch_size} x "
            f"gradient_accumulation_steps {accumulation}) can't be divided among {world} "
            f"processes.\nThe nearest sizes that can: {nearest}. Set custom_params so, or start "
            "as many processes as divide it."
        )
    return min(windows.batch_size, step_size // world)
