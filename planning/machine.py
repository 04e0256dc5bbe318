"""The device of a run, and which build of torch can use the GPU that is there."""

import dataclasses
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from data import WindowPlan
from distributed.parallel import ALONE, Parallel
from distributed.sharding import build_in_parts, whole
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
from engine.errors import ResourceError, SettingsError, first_line
from engine.memory import (
    ADVICE,
    as_bytes,
    available_memory,
    estimate_memory,
    halved,
    is_out_of_memory,
)
from engine.precision import Precision, choose_precision, keep_precision
from engine.processor import default_threads, threads_are_set
from engine.settings import shown
from model import GPTConfig, GPTModel, attention_kernel
from planning.agreement import precision_that_agrees
from planning.decisions import RunRecord
from planning.plan import RunPlan
from training_utils import TrainingConfig

TORCH = "2.13.0"  # as requirements.txt pins it
WHEELS = "https://download.pytorch.org/whl"
# builds of that version: the driver that each needs, and the compute capabilities it serves
CU130, CU130_DRIVER, CU130_CAPABILITY = "cu130", 580, (7, 5)
CU126, CU126_DRIVER, CU126_CAPABILITY, CU126_BELOW = "cu126", 525, (5, 0), (10, 0)


@dataclass(frozen=True)
class Machine:
    """How a run uses the machine it is on."""

    device: torch.device
    parallel: Parallel
    precision: Precision
    threads: int = 1
    workers: int = 0  # processes of each loader
    micro_batch: int = 1  # the most windows that a forward pass takes
    notices: tuple[str, ...] = ()  # what of this is not as it was asked for

    def but(self, *notices: str, **changes: Any) -> "Machine":
        """The same with some changes, and notices of them."""
        return dataclasses.replace(self, notices=self.notices + notices, **changes)

    def computing_in(self, precision: Precision) -> "Machine":
        """The same with a precision, and a notice of it where it is another one."""
        if precision.name == self.precision.name:
            return self
        notice = f"precision is {precision.name}: {precision.reason}"
        return self.but(notice, precision=precision)


def find_machine(plan: RunPlan, parallel: Parallel = ALONE) -> Machine:
    """The device of a run, and the precision that a new run computes in.

    Raises what pick_device() and choose_precision() do.
    """
    device = pick_device(plan.run.DEVICE, parallel)
    precision = choose_precision(plan.run.PRECISION, device)
    parallel.require_same(device=device.type, precision=precision.name)
    return Machine(device, parallel, precision)


def pick_device(requested: str | None, parallel: Parallel = ALONE) -> torch.device:
    """The device that DEVICE names, or the best of this machine: MPS, then CUDA, XPU, CPU.

    It has its index, and is the current device of torch.cuda or torch.xpu from here on. Of
    several ranks each takes a GPU of its own. Raises ResourceError where the named one is not
    there or the installed torch has no kernels for it, SettingsError where it is none.
    """
    if fault := find_device_fault(requested):
        raise SettingsError(f"the device is {shown(requested)}; it {fault}, or None")
    counts = _count_devices()
    if not parallel.is_alone:
        return _device_of_rank(requested, parallel, counts["cuda"])
    if requested is None:
        requested = next(kind for kind in ("mps", "cuda", "xpu", "cpu") if counts[kind])
    kind, _, index = requested.partition(":")
    # not by torch.device's index: above 127 it is another one
    if int(index or 0) >= counts[kind]:
        raise ResourceError(_about_missing_device(requested, counts))
    return _ready(torch.device(requested))


def _count_devices() -> dict[str, int]:
    """How many devices of each kind torch can use."""
    with warnings.catch_warnings():  # of a driver that is too old; why_no_gpu() tells of it
        warnings.filterwarnings("ignore", "CUDA initialization")
        return {kind: device_count(kind) for kind in KINDS}


def _device_of_rank(requested: str | None, parallel: Parallel, n_cuda: int) -> torch.device:
    """The device of one of several ranks: a CUDA GPU of its own, or its share of the CPU."""
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
    """The device with its index, as the current one: torch pins memory and records graphs there.

    Raises ResourceError where the installed torch has no kernels for it.
    """
    device = with_index(device)
    capability = cuda_capability(device)
    if capability is not None and not has_kernels(capability, torch.cuda.get_arch_list()):
        gpu = Gpu(device_name(device), capability, None)
        major, minor = capability
        raise ResourceError(
            f"{gpu.name} has compute capability {major}.{minor}, and the installed torch "
            f"({torch.__version__}) has no kernels for it.\n{_way_out(gpu)}\n"
            'Or set DEVICE = "cpu".'
        )
    if device.index is not None:
        getattr(torch, device.type).set_device(device)
    return device


def has_kernels(capability: tuple[int, int], arch_list: list[str]) -> bool:
    """Whether a build of torch for these architectures can run on a GPU of this capability.

    Machine code ("sm_86") runs on GPUs of its major version and no lower minor one, PTX
    ("compute_120") on every later GPU. A list that is empty says nothing.
    """
    for arch in arch_list:
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("af")  # sm_90a, sm_100f
        if not digits.isdecimal():
            continue
        built_for = int(digits[:-1]), int(digits[-1])
        is_machine_code = kind == "sm" and built_for[0] == capability[0]
        if built_for <= capability and (is_machine_code or kind == "compute"):
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
    batch: Iterable[torch.Tensor],
    device: torch.device,
) -> None:
    """Raise ResourceError unless parameters, buffers, optimizer state and a batch are on device."""
    tensors = [(f"parameter {name}", tensor) for name, tensor in model.named_parameters()]
    tensors += [(f"buffer {name}", tensor) for name, tensor in model.named_buffers()]
    tensors += [
        (f"optimizer state {name}", value)
        for state in optimizer.state.values()
        for name, value in state.items()
        # AdamW keeps its 0-d step counters on the CPU where it is not fused
        if isinstance(value, torch.Tensor) and value.dim() > 0
    ]
    tensors += [(f"batch part {i}", tensor) for i, tensor in enumerate(batch)]
    strays = [f"{name} is on {t.device}" for name, t in tensors if not _is_on(t, device)]
    if strays:
        more = f" and {len(strays) - 3} more" if len(strays) > 3 else ""
        raise ResourceError(
            f"not everything is on {device}: {'; '.join(strays[:3])}{more}.\n"
            "Move the model to the device before its optimizer is built."
        )


def _is_on(tensor: torch.Tensor, device: torch.device) -> bool:
    # "cuda" without an index means the current one
    same_index = device.index is None or tensor.device.index == device.index
    return tensor.device.type == device.type and same_index


# ------------------------------------------------------------------------------ which torch


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as nvidia-smi tells of it."""

    name: str
    capability: tuple[int, int] | None  # None: not told by drivers before 510
    driver: str | None  # "535.104.05"; None: not asked


def why_no_gpu() -> str | None:
    """Why torch can't use the NVIDIA GPU of this machine, and the command that helps.

    None where there is none, or it was hidden by CUDA_VISIBLE_DEVICES.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return None
    gpu = _ask_nvidia_smi()
    if gpu is None:
        return None
    if torch.version.cuda is None:
        return f"{gpu.name} is here, but the installed torch has no CUDA. {_way_out(gpu)}"
    needed = CU130_DRIVER if int(torch.version.cuda.split(".")[0]) >= 13 else CU126_DRIVER
    if _major(gpu.driver) < needed:
        return (
            f"{gpu.name} has the driver {gpu.driver}, and the installed torch "
            f"(CUDA {torch.version.cuda}) needs {needed} or newer. {_way_out(gpu)}"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"{gpu.name} is here, but CUDA does not start: {first_line(error)[:200]}"
    return None


def pip_line(build: str) -> str:
    """The command that installs this build of torch; requirements.txt's pin stays satisfied."""
    return f'pip install "torch=={TORCH}+{build}" --index-url {WHEELS}/{build}'


def _way_out(gpu: Gpu) -> str:
    """What makes a GPU usable: a build of torch that serves it, or a newer driver."""
    # what is not known is taken for a recent one
    capability = gpu.capability or CU130_CAPABILITY
    driver = _major(gpu.driver) if gpu.driver else CU130_DRIVER
    if capability < CU126_CAPABILITY:
        return "No recent torch serves a GPU this old."
    if capability >= CU130_CAPABILITY and driver >= CU130_DRIVER:
        return f"This torch serves it: {pip_line(CU130)}"
    if capability < CU126_BELOW and driver >= CU126_DRIVER:
        return f"This torch serves it: {pip_line(CU126)}"
    needed = CU126_DRIVER if capability < CU126_BELOW else CU130_DRIVER
    build = CU126 if capability < CU126_BELOW else CU130
    return f"Update the driver to {needed} or newer, then: {pip_line(build)}"


def _ask_nvidia_smi() -> Gpu | None:
    """The first NVIDIA GPU, or None where no driver tells of one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
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
            capability = values[2].split(".") if len(values) == 3 else []
            is_told = len(capability) == 2 and all(part.isdecimal() for part in capability)
            return Gpu(values[0], tuple(map(int, capability)) if is_told else None, values[1])
    return None


def _major(driver: str) -> int:
    digits = driver.partition(".")[0]
    return int(digits) if digits.isdecimal() else CU130_DRIVER


def build_model(config: GPTConfig, device: torch.device) -> GPTModel:
    """A model with fresh weights on a device; ResourceError where it does not fit."""
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
    """The run's model with the weights of its seed; ResourceError where it can't be trained."""
    device, parallel, precision = machine.device, machine.parallel, machine.precision
    sizes = {"context_length": windows.max_length, "vocab_size": vocab_size}
    config = GPTConfig(**plan.model | sizes)
    torch.manual_seed(plan.run.SEED)
    if parallel.kind == "fsdp":
        _require_memory_for(config, device, parallel.world, precision)
        model = build_in_parts(lambda: GPTModel(config), parallel, precision, device)
    else:
        _require_memory_for(config, device)
        model = build_model(config, device)
    parallel.seed_apart(plan.run.SEED)
    model.activation_checkpointing = asked.activation_checkpointing
    return model


def _require_memory_for(
    config: GPTConfig,
    device: torch.device,
    parts: int = 1,
    precision: Precision | None = None,
) -> None:
    """Raise ResourceError where not even the model's matrices can be trained on a device.

    A system that promises more memory than it has would end the process instead of refusing. Of a
    model in parts an evaluation gathers all weights, in the precision of their products.
    """
    n_matrices = 1 if config.tie_embeddings else 2
    least = n_matrices * config.vocab_size * config.emb_dim
    least += config.n_layers * 2 * config.emb_dim * (config.emb_dim + config.ff_dim)
    needed = least * 4 * 3 // parts  # weights, gradients and one moment of each
    if parts > 1:
        needed += least * (4 if precision.name == "fp32" else 2)
    room = available_memory(device)
    if room is not None and needed > room:
        raise ResourceError(
            f"training this model takes more than {as_bytes(needed)} of memory, and {device} has "
            f"{as_bytes(room)} free.\nSet a smaller n_layers or emb_dim, or another MODEL."
        )


def fit_into_memory(
    machine: Machine, model: GPTModel, asked: TrainingConfig, windows: WindowPlan
) -> Machine:
    """The machine with a micro-batch that there is memory for; shows the estimate.

    Raises ResourceError where there is none for a single window.
    """
    device, parallel, micro_batch = machine.device, machine.parallel, machine.micro_batch
    parts = parallel.world if parallel.kind == "fsdp" else 1
    share = windows.batch_size * asked.gradient_accumulation_steps // parallel.world
    for accumulates in (micro_batch < share, True):
        with whole(model, parallel):
            estimate = estimate_memory(
                model,
                n_tokens=windows.max_length,
                n_windows=micro_batch,
                precision=machine.precision,
                device=device,
                optimizer=asked.optimizer,
                keeps_best=device.type != "cuda" and parallel.is_main,
                parts=parts,
                accumulates=accumulates,
            )
        room = available_memory(device)
        if room is not None:
            if device.type != "cuda":
                room //= parallel.local_world  # the others are about to take as much
            room += sum(p.nbytes for p in model.parameters()) // parts  # they are there already
        fitting = estimate.largest_fit(micro_batch, room)
        if parallel.lowest(fitting) == micro_batch:  # else a step has more of them
            break
    told, there = estimate.described(max(1, fitting)), "" if room is None else as_bytes(room)
    if fitting == 0:
        raise ResourceError(
            f"a step with a single window of {windows.max_length:,} tokens at a time takes about "
            f"{as_bytes(estimate.total(1))} of memory, and {device} has {there} free:\n"
            f"{told}.\n{ADVICE}"
        )
    fitting = parallel.lowest(fitting)
    needed = estimate.total(fitting)
    of_room = f" of {there} free" if there else ""
    say(f"Memory: about {as_bytes(needed)}{of_room}" + f" ({told})" * (needed > 1e9))
    if fitting == micro_batch:
        return machine
    return machine.but(
        f"memory: {fitting} windows at a time instead of {micro_batch}, which would take "
        f"{as_bytes(estimate.total(micro_batch))}; the batch stays the same",
        micro_batch=fitting,
    )


def check_arithmetic(machine: Machine, model: GPTModel, loader: DataLoader) -> Machine:
    """The machine with a precision in which its GPU is right about the model.

    Apple's GPUs have been wrong before, so what they compute is held against the CPU. On CUDA the
    attention kernel is named, because a wrong library on the path makes it a slow one.
    """
    device, precision = machine.device, machine.precision
    if device.type == "mps":
        ids, targets = (part.to(device) for part in loader.dataset.__getitems__([0]))
        machine = machine.computing_in(precision_that_agrees(model, ids, targets, precision))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for products that stay in fp32
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
    """The machine with precision, threads, loaders' workers and micro-batch of a run.

    before is the run that goes on. Raises SettingsError where ranks can't have equal shares of a
    batch.
    """
    device, parallel, night = machine.device, machine.parallel, plan.run.NIGHT_MODE
    machine = decide_precision(machine, plan.run.PRECISION, before)
    most = share_of_a_batch(asked, windows, parallel)
    micro_batch, about_memory = decide_micro_batch(night, device, most, parallel, before)
    threads, about_threads = decide_threads(night, device, parallel, before)
    workers, about_workers = decide_workers(asked.num_workers, parallel.local_world)
    return machine.but(
        *about_memory,
        *about_threads,
        *about_workers,
        threads=threads,
        workers=workers,
        micro_batch=micro_batch,
    )


def decide_workers(asked: int, processes: int) -> tuple[int, list[str]]:
    """How many of a loader's workers there are cores for, and notices."""
    cores = max(1, (os.cpu_count() or 1) // processes)
    if asked <= cores:
        return asked, []
    return cores, [f"num_workers is lowered from {asked} to {cores}: so many cores are there"]


def decide_precision(machine: Machine, requested: str, before: RunRecord | None) -> Machine:
    """The machine with what "auto" came to when the run began that goes on."""
    if before is None or requested != "auto":
        return machine
    return machine.computing_in(keep_precision(before.precision.name, machine.device))


def decide_threads(
    night_mode: bool, device: torch.device, parallel: Parallel, before: RunRecord | None
) -> tuple[int, list[str]]:
    """How many threads to use, and notices; a run that goes on as it began keeps its number.

    NIGHT_MODE leaves half of the cores to others where the CPU computes.
    """
    usual = default_threads(parallel.local_world)
    is_halved = night_mode and device.type == "cpu"
    threads = max(1, usual // 2) if is_halved else usual
    # a number set from outside is somebody's wish
    if _is_shared_as(before, night_mode, parallel) and not threads_are_set(parallel.local_world):
        threads = min(before.threads, os.cpu_count() or 1)
    return threads, [f"night mode: {threads} of {usual} threads"] if is_halved else []


def decide_micro_batch(
    night_mode: bool,
    device: torch.device,
    most: int,
    parallel: Parallel,
    before: RunRecord | None,
) -> tuple[int, list[str]]:
    """How many windows at a time, at most so many, and notices; a run that goes on as it began
    keeps its number.

    NIGHT_MODE leaves half of a GPU's memory to others: a step then goes through its windows in
    smaller parts, with the same sum up to rounding.
    """
    micro_batch, notices = most, []
    if night_mode and device.type != "cpu":
        micro_batch = halved(most)
        memory = "half of the memory, " if limit_memory(device, 0.5) else ""
        notices.append(f"night mode: {memory}{micro_batch} windows at a time instead of {most}")
    if _is_shared_as(before, night_mode, parallel):
        micro_batch = min(before.micro_batch, most)
    if noted := parallel.noted("micro_batch"):  # what a failure of this job has shown
        micro_batch = min(micro_batch, int(noted))
    return micro_batch, notices


def _is_shared_as(before: RunRecord | None, night_mode: bool, parallel: Parallel) -> bool:
    """Whether a run that goes on shares the machine in the way in which it began."""
    return (
        before is not None
        and before.ranks == parallel.world
        and before.settings["NIGHT_MODE"] == night_mode
    )


def share_of_a_batch(asked: TrainingConfig, windows: WindowPlan, parallel: Parallel) -> int:
    """How many windows a rank goes through at a time, at most batch_size of its share of a step.

    Raises SettingsError where ranks can't have equal shares.
    """
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
