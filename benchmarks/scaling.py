"""Scaling, on paper: memory a rank and time a step on 1 to 1,024 GPUs, under DDP and FSDP2.

    python -m benchmarks.scaling [--recompute] [--device-results FILE] [--inside GB_S]
                                 [--between GB_S]
    python -m benchmarks.scaling --measure

Parameters and work are counted on the real model, activations and a CPU's steps are measured.
Without --device-results the speed of a GPU is a published one, which nobody has measured here;
--measure writes the file that replaces it, on a CPU or GPU. The network's terms are assumptions:
Network and Assumptions have them all. docs/scaling.md shows the tables and says what they mean.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.report import RESULTS, machine, write_results
from benchmarks.steps import BF16_PEAKS, median_seconds_in_turn, prepare_step
from engine.compiling import what_prevents_compiling
from engine.console import say, use_utf8
from engine.memory import (
    OPTIMIZER_BYTES,
    MemoryEstimate,
    _head_bytes,
    available_memory,
    halved,
    is_out_of_memory,
    measure_activations,
)
from engine.precision import Precision, choose_precision
from environment import pick_device
from model import GPTConfig, GPTModel
from planning.plan import MODELS_FILE, read_models

PARALLEL = ("ddp", "fsdp")
RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)
FP32, BF16 = 4, 2  # bytes
GPU_BF16 = Precision("bf16", "assumed of every GPU here", "cuda")


# ------------------------------------------------------------------------- what is to be trained


@dataclass(frozen=True)
class Case:
    """A model, and how many windows of its context one optimizer step takes over all ranks."""

    name: str
    config: GPTConfig
    n_windows: int
    published_mfu: float  # of an H100's dense bf16 peak, by 6N + 12LHDT
    source: str

    @property
    def n_tokens(self) -> int:
        """The tokens of a step."""
        return self.n_windows * self.config.context_length


def cases() -> list[Case]:
    """The three models. None has dropout, and 124M is otherwise config.json's."""
    models, _ = read_models(MODELS_FILE)
    small = models["gpt2-124m"] | {"vocab_size": 50257, "drop_rate": 0.0}
    xl = small | {"n_layers": 48, "emb_dim": 1600, "n_heads": 25}
    llama = GPTConfig(
        vocab_size=32000,
        context_length=4096,
        emb_dim=4096,
        n_heads=32,
        n_layers=32,
        architecture="llama",
        tie_embeddings=False,
    )
    return [
        Case("124M", GPTConfig(**small), 512, 0.41, "llm.c, 124M on 8 H100"),
        Case("1.5B", GPTConfig(**xl), 1024, 0.46, "nanochat d18, some 0.5B, on 8 H100"),
        Case("7B", llama, 1024, 0.39, "torchtitan, Llama 3 8B on 8 H100, compiled"),
    ]


@dataclass(frozen=True)
class Counts:
    """What a model consists of: parameters, and floating point operations a token and step.

    block is one block's Linear modules, the group that FSDP2 gathers in bf16; root is all else,
    which it gathers in fp32.
    """

    n_layers: int
    block: int
    root: int
    block_flop: float
    head_flop: float
    head_weight: torch.Tensor  # on the meta device: its shape alone

    @property
    def parameters(self) -> int:
        """All trained parameters."""
        return self.n_layers * self.block + self.root

    @property
    def flop(self) -> float:
        """Floating point operations for a token, forward and backward."""
        return self.n_layers * self.block_flop + self.head_flop


def count(config: GPTConfig) -> Counts:
    """Count on the real model, which is built without memory for its weights."""
    with torch.device("meta"):
        model = GPTModel(config)
    linear = [layer for layer in model.blocks[0].modules() if isinstance(layer, nn.Linear)]
    block = sum(p.numel() for layer in linear for p in layer.parameters())
    head_flop = 6 * model.head.weight.numel()
    return Counts(
        n_layers=config.n_layers,
        block=block,
        root=model.count_parameters() - config.n_layers * block,
        block_flop=(model.flop_per_token() - head_flop) / config.n_layers,
        head_flop=head_flop,
        head_weight=model.head.weight,
    )


@dataclass(frozen=True)
class Activations:
    """Bytes that a model of one block keeps for its backward pass, and those of each further one.

    fixed is there whatever the number of windows: weights in bf16, which FSDP2 doesn't keep.
    """

    fixed: int
    fixed_block: int
    window: int
    window_block: int


def measure_few_layers(config: GPTConfig, device: torch.device) -> Activations:
    """Measure a model of this width with one block, and with two; any weights will do."""
    measured = []
    for n_layers in (1, 2):
        with torch.device("meta"):
            # a vocabulary of any size: nothing is kept of it beside the weights
            model = GPTModel(replace(config, vocab_size=64, n_layers=n_layers))
        model.to_empty(device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().zero_()
        model.tie_head()
        precision = replace(GPU_BF16, device_type=device.type)
        measured.append(measure_activations(model, config.context_length, precision, device))
    (fixed, window), (fixed_of_two, window_of_two) = measured
    return Activations(fixed, fixed_of_two - fixed, window, window_of_two - window)


@dataclass(frozen=True)
class Model:
    """A case with all that is known of it before anything is divided."""

    case: Case
    counts: Counts
    kept: Activations


def known_models(results: dict) -> list[Model]:
    """The cases with what is counted and what --measure has written."""
    return [
        Model(case, count(case.config), Activations(**results["activations"][case.name]))
        for case in cases()
    ]


# --------------------------------------------------------------------------- devices and networks


@dataclass(frozen=True)
class Device:
    """One GPU or CPU; speeds are by the names of cases, those that are known."""

    name: str
    memory: float  # bytes that training may take
    flop_per_second: dict[str, float]
    once_s_per_parameter: float  # clipping and optimizer, of each parameter that a rank has
    launched_s: float  # the host's time to start the kernels of a block, forward and backward
    source: str


@dataclass(frozen=True)
class Assumptions:
    """What neither a count nor a measurement gives."""

    reserved: float = 4e9  # of a GPU's memory: CUDA, NCCL's buffers, gaps
    launched_s: float = 90 * 5e-6  # kernels of a block, not compiled, and the host's time for each
    # a parameter's bytes through memory: AdamW 28, the norm of the gradient 4, clipping it 8
    once_bytes: float = 40.0
    overlap: float = 0.9  # of a message beside computing; the rest of it holds the computing up
    bucket: float = 25 * 2**20  # DDP's messages, in bytes
    # the ranks' hosts agree on flags by gloo, which goes around all of them twice
    agree_hop_s: float = 30e-6


@dataclass(frozen=True)
class Network:
    """Speeds that messages reach (nccl-tests: busbw) and the wait for each hop of one."""

    name: str
    inside: float  # B/s of each GPU to its neighbours in the node, in one direction
    between: float  # B/s of each node to others, over all its adapters, in one direction
    inside_hop_s: float = 2e-6
    between_hop_s: float = 5e-6
    gpus_per_node: int = 8

    def bytes_per_second(self, ranks: int) -> float:
        """Of a ring through all ranks: the slower of both links."""
        return self.inside if ranks <= self.gpus_per_node else min(self.inside, self.between)

    def ring_s(self, ranks: int) -> float:
        """The hops of a message once around all ranks."""
        nodes = -(-ranks // self.gpus_per_node)
        hops_between = nodes if nodes > 1 else 0
        return (ranks - 1 - hops_between) * self.inside_hop_s + hops_between * self.between_hop_s

    def tree_s(self, ranks: int) -> float:
        """The hops of a message from the leaves of a tree to its root."""
        nodes = -(-ranks // self.gpus_per_node)
        inside = math.ceil(math.log2(min(ranks, self.gpus_per_node)))
        return inside * self.inside_hop_s + math.ceil(math.log2(nodes)) * self.between_hop_s

    def all_reduce_s(self, size: float, ranks: int) -> float:
        """Sum `size` bytes over all ranks, by ring or tree, whichever is faster."""
        if ranks == 1:
            return 0.0
        moving = 2 * (ranks - 1) / ranks * size / self.bytes_per_second(ranks)
        return moving + 2 * min(self.ring_s(ranks), self.tree_s(ranks))

    def gather_s(self, size: float, ranks: int) -> float:
        """All-gather, or reduce-scatter, of `size` bytes that no rank had, or has, alone."""
        if ranks == 1:
            return 0.0
        moving = (ranks - 1) / ranks * size / self.bytes_per_second(ranks)
        return moving + self.ring_s(ranks)


def networks(inside: float | None = None, between: float | None = None) -> list[Network]:
    """The two that are assumed: NVLink within nodes, each 8 GPUs, at 80% of the links' rates.

    The first has a 400 Gb/s adapter for each GPU, the second one of 100 Gb/s for all 8. What is
    given, in B/s, stands in their place, and makes them one.
    """
    nvlink, infiniband, ethernet = 450e9, 8 * 50e9, 12.5e9
    if inside is not None or between is not None:
        return [Network("as given", inside or 0.8 * nvlink, between or 0.8 * infiniband)]
    return [
        Network("400 Gb/s a GPU", 0.8 * nvlink, 0.8 * infiniband),
        Network("100 Gb/s a node", 0.8 * nvlink, 0.8 * ethernet),
    ]


def published_h100() -> Device:
    """An H100 SXM of 80 GB, by its data sheet and what others have published of it."""
    assumed = Assumptions()
    return Device(
        name="H100 SXM, 80 GB",
        memory=80e9 - assumed.reserved,
        flop_per_second={case.name: case.published_mfu * BF16_PEAKS["H100"] for case in cases()},
        once_s_per_parameter=assumed.once_bytes / (0.9 * 3.35e12),
        launched_s=assumed.launched_s,
        source="published, not measured here: "
        + "; ".join(f"{case.name} {case.published_mfu:.0%} ({case.source})" for case in cases()),
    )


def measured_device(results: dict) -> Device:
    """The device that --measure has seen. Raises KeyError where it isn't such a file."""
    assumed, on_gpu = Assumptions(), results["machine"]["device"] != "cpu"
    name, memory = results["machine"]["name"], results["memory"]
    return Device(
        name=name,
        memory=math.inf if memory is None else memory - (assumed.reserved if on_gpu else 0),
        flop_per_second={
            name: speed["flop_per_second"] for name, speed in results["speed"].items()
        },
        once_s_per_parameter=max(s["once_s_per_parameter"] for s in results["speed"].values()),
        launched_s=assumed.launched_s if on_gpu else 0.0,
        source=f"measured on {name} with {results['machine']['threads']} of its host's threads, "
        f"torch {results['machine']['torch']}",
    )


# ---------------------------------------------------------------------------- a rank, and its step


@dataclass(frozen=True)
class Plan:
    """How the ranks share a step."""

    model: Model
    parallel: str  # "ddp" or "fsdp"
    ranks: int
    at_a_time: int  # windows of a micro-batch
    recomputes: bool  # activation_checkpointing: blocks are computed again for the gradients

    @property
    def per_rank(self) -> int:
        """A rank's windows of a step."""
        return self.model.case.n_windows // self.ranks

    @property
    def accumulation(self) -> int:
        """The micro-steps of a step."""
        return -(-self.per_rank // self.at_a_time)

    def memory(self) -> MemoryEstimate:
        """What a rank's GPU holds at the peak of a step, in parts."""
        counts, kept, config = self.model.counts, self.model.kept, self.model.case.config
        if self.recomputes:
            # what goes into each block is kept, and one block at a time is computed once more
            into_blocks = config.n_layers * config.context_length * config.emb_dim * FP32
            window, fixed = kept.window + into_blocks, kept.fixed
        else:
            window = kept.window + (config.n_layers - 1) * kept.window_block
            fixed = kept.fixed + (config.n_layers - 1) * kept.fixed_block
        weights = gradients = FP32 * counts.parameters
        optimizer = OPTIMIZER_BYTES["adamw"][0] * counts.parameters
        if self.parallel == "fsdp":
            fixed, part = 0, weights // self.ranks
            # micro-steps before the last leave their gradients in whole
            whole = FP32 * counts.n_layers * counts.block if self.accumulation > 1 else 0
            # beside the parts: two blocks in bf16 and the root in fp32; a block's gradient in
            # bf16, and as the fp32 that is sent; the root's gradient
            weights = part + 2 * BF16 * counts.block + FP32 * counts.root
            gradients = part + whole + (BF16 + FP32) * counts.block + FP32 * counts.root
            optimizer //= self.ranks
        n_rows = self.at_a_time * config.context_length
        head = _head_bytes(counts.head_weight, n_rows, GPU_BF16, torch.device("cuda"))
        return MemoryEstimate(weights, gradients, optimizer, 0, fixed, window, head)

    @property
    def total(self) -> int:
        """The parts of memory together, in bytes."""
        return self.memory().total(self.at_a_time)


def make_plan(
    model: Model, parallel: str, ranks: int, room: float, *, recompute: bool = False
) -> tuple[Plan, bool]:
    """The most windows at a time that fit into room bytes, and whether even one does.

    Blocks are computed again only where none fits otherwise, or where recompute says so. Raises
    ValueError where the windows of a step can't be divided over the ranks.
    """
    n_windows = model.case.n_windows
    if n_windows % ranks:
        raise ValueError(f"{n_windows} windows can't be divided over {ranks} ranks")
    for recomputes in (True,) if recompute else (False, True):
        plan = Plan(model, parallel, ranks, n_windows // ranks, recomputes)
        while plan.total > room and plan.at_a_time > 1:
            plan = replace(plan, at_a_time=halved(plan.at_a_time))
        if plan.total <= room:
            return plan, True
    return plan, False


@dataclass(frozen=True)
class Pieces:
    """The pieces of a rank's step, in seconds; of a block, or of all else (root)."""

    n_layers: int
    accumulation: int
    forward: float
    backward: float
    head: float  # with its loss, both ways
    once: float  # clipping and optimizer
    gather: float  # a block's weights
    gather_root: float
    reduce: float  # a block's gradients
    reduce_root: float
    overlap: float
    launch_forward: float  # the host's time for a block
    launch_backward: float
    agree: float  # the host's, at the end

    @property
    def host(self) -> float:
        """The host's time for a step: a GPU that has less to do waits for it."""
        launching = self.n_layers * (self.launch_forward + self.launch_backward)
        return self.accumulation * launching + self.agree


def make_pieces(plan: Plan, device: Device, network: Network) -> Pieces:
    """Take a step apart: work over speed, bytes over bandwidth, hops by their wait."""
    assumed, ranks = Assumptions(), plan.ranks
    case, counts = plan.model.case, plan.model.counts
    n_tokens = plan.per_rank * case.config.context_length / plan.accumulation
    rate = device.flop_per_second[case.name]
    block_s = n_tokens * counts.block_flop / rate
    back = 1 if plan.recomputes else 2 / 3  # of a block's forward and backward
    sharded = plan.parallel == "fsdp"

    def reduced(n_parameters: int) -> float:
        size = FP32 * n_parameters
        if sharded:
            return network.gather_s(size, ranks)
        n_messages = max(1, round(size / assumed.bucket))
        return n_messages * network.all_reduce_s(size / n_messages, ranks)

    return Pieces(
        n_layers=counts.n_layers,
        accumulation=plan.accumulation,
        forward=block_s / 3,
        backward=block_s * back,
        head=n_tokens * counts.head_flop / rate,
        once=device.once_s_per_parameter * counts.parameters / (ranks if sharded else 1),
        gather=network.gather_s(BF16 * counts.block, ranks) if sharded else 0.0,
        gather_root=network.gather_s(FP32 * counts.root, ranks) if sharded else 0.0,
        reduce=reduced(counts.block),
        reduce_root=reduced(counts.root),
        overlap=assumed.overlap,
        launch_forward=device.launched_s / 3,
        launch_backward=device.launched_s * back,
        agree=2 * (ranks - 1) * assumed.agree_hop_s,
    )


def step_seconds(p: Pieces) -> float:
    """A step by formula: of a block's computing and its messages, whichever takes longer.

    The first weights of each pass and the last gradients have nothing to hide behind.
    """

    def blocks(computing: float, message: float) -> float:
        beside = computing + (1 - p.overlap) * message
        return p.gather + (p.n_layers - 1) * max(beside, message) + computing

    forward = p.gather_root + blocks(p.forward, p.gather) + p.head
    last = blocks(p.backward, p.gather + p.reduce) + p.reduce + p.reduce_root
    earlier = (p.accumulation - 1) * blocks(p.backward, p.gather)
    return max(p.accumulation * forward + earlier + last + p.once, p.host)


def efficiency(plan: Plan, device: Device, seconds: float) -> float:
    """One GPU's time for the whole step, had it the memory, by that of all ranks together."""
    case, counts = plan.model.case, plan.model.counts
    alone = case.n_tokens * counts.flop / device.flop_per_second[case.name]
    return (alone + device.once_s_per_parameter * counts.parameters) / (plan.ranks * seconds)


# ---------------------------------------------------------------------------------- by simulation


class Streams:
    """Queues, as CUDA streams are: each does one thing at a time, in the order in which they came.

    "host" launches, "compute" and "network" are of the GPU.
    """

    def __init__(self) -> None:
        self.free_at = {"host": 0.0, "compute": 0.0, "network": 0.0}

    def add(self, stream: str, seconds: float, *after: float) -> float:
        """Do something once the stream is free and all times in `after` are past; when it ends."""
        self.free_at[stream] = max(self.free_at[stream], *after, 0.0) + seconds
        return self.free_at[stream]


def simulated_seconds(p: Pieces, steps: int = 2) -> float:
    """The same step played event by event, in the order in which DDP and FSDP2 issue them.

    Several steps are, for the host may be ahead of the GPU; all but the first count.
    """
    streams, now, ends = Streams(), 0.0, []
    for _ in range(steps):
        for number in range(p.accumulation):
            gathered = streams.add("network", p.gather_root, now)
            now = _simulate_pass(streams, p, "forward", gathered, reduces=False)
            now = streams.add("compute", p.head, now)
            is_last = number == p.accumulation - 1
            now = _simulate_pass(streams, p, "backward", now, reduces=is_last)
        now = streams.add("compute", p.once, streams.add("network", p.reduce_root, now))
        streams.add("host", p.agree)
        ends.append(now)
    return (ends[-1] - ends[0]) / (steps - 1)


def _simulate_pass(streams: Streams, p: Pieces, way: str, now: float, *, reduces: bool) -> float:
    """Go through all blocks, one way; when the last one is computed.

    Weights are fetched one block ahead: a block's are asked for when the one before it begins.
    """
    forward = way == "forward"
    computing, launch = (
        (p.forward, p.launch_forward) if forward else (p.backward, p.launch_backward)
    )
    gathered, under_way = streams.add("network", p.gather, now), 0.0
    for number in range(p.n_layers):
        begins_at = max(now, gathered, streams.add("host", launch))
        if number < p.n_layers - 1:
            gathered = streams.add("network", p.gather, begins_at)
            under_way += p.gather
        now = streams.add("compute", computing + (1 - p.overlap) * under_way, begins_at)
        under_way = 0.0
        if reduces:
            streams.add("network", p.reduce, now)
            under_way = p.reduce
    return now


# ------------------------------------------------------------------------------- on this machine


@dataclass(frozen=True)
class Sizes:
    """What --measure times: a model of n_layers, in batches of three sizes; None is the case's."""

    windows: tuple[int, int, int]
    n_layers: int | None = None
    n_tokens: int | None = None


# a model cut in depth has the speed of the whole one, but for the head's larger share
SIZES = {
    "cpu": {"124M": Sizes((1, 2, 4), n_tokens=256)},
    "cuda": {
        "124M": Sizes((4, 8, 32)),
        "1.5B": Sizes((2, 4, 16), n_layers=8),
        "7B": Sizes((1, 2, 4), n_layers=4),
    },
}


def measure_speed(case: Case, sizes: Sizes, device: torch.device) -> dict:
    """Time steps of three sizes: what the smallest and the largest take tells both terms of a
    step, its work and what comes once; the one between is held against them."""
    config = replace(
        case.config,
        n_layers=sizes.n_layers or case.config.n_layers,
        context_length=sizes.n_tokens or case.config.context_length,
    )
    compiled = device.type == "cuda" and what_prevents_compiling(device) is None
    precision = choose_precision("auto", device)
    model, step = prepare_step(config, device, precision, compiled=compiled)
    flop = model.flop_per_token() * config.context_length
    work = []
    for n_windows in sizes.windows:
        shape = (2, n_windows, config.context_length)
        ids, targets = torch.randint(config.vocab_size, shape, device=device)
        work.append(partial(step, ids, targets))
    rounds = [median_seconds_in_turn(work, device, repeats=3) for _ in range(4)]
    seconds = [min(medians) for medians in zip(*rounds, strict=True)]  # others only ever slow it
    once, per_window = split_seconds(sizes.windows, seconds)
    return {
        **asdict(sizes),
        "parameters": model.count_parameters(),
        "precision": precision.name,
        "compiled": compiled,
        "seconds": seconds,
        "predicted_seconds": [once + n * per_window for n in sizes.windows],
        "flop_per_second": flop / per_window,
        "once_s_per_parameter": once / model.count_parameters(),
    }


def split_seconds(windows: tuple[int, ...], seconds: list[float]) -> tuple[float, float]:
    """What a step takes once, and for each window, by its first and last size."""
    per_window = (seconds[-1] - seconds[0]) / (windows[-1] - windows[0])
    once = max(0.0, seconds[0] - windows[0] * per_window)
    return once, (seconds[-1] - once) / windows[-1]


def measure() -> None:
    """Measure this machine's best device and write what --device-results reads."""
    device = pick_device(None)
    sizes = SIZES["cuda" if device.type == "cuda" else "cpu"]
    results = {"machine": machine(device), "memory": device_memory(device)}
    results["activations"], results["speed"] = {}, {}
    for case in cases():
        results["activations"][case.name] = asdict(measure_few_layers(case.config, device))
        if case.name in sizes:
            try:
                speed = measure_speed(case, sizes[case.name], device)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                say(f"{case.name}: there is too little memory here to measure it")
                continue
            results["speed"][case.name] = speed
            say(f"{case.name}: {speed['flop_per_second'] / 1e9:,.0f} GFLOP/s")
    if not results["speed"]:
        sys.exit("nothing could be measured, so nothing is written")
    say(f"written to {write_results('scaling', device, results)}")


def device_memory(device: torch.device) -> int | None:
    """All bytes of a GPU, or those of another device that are free now, where that is told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return available_memory(device)


# ------------------------------------------------------------------------------------- the tables


def read_results(path: Path) -> dict:
    """What --measure has written. Raises ValueError that says what is wrong with the file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        measured_device(results)
        known_models(results)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} can't be read as results of --measure ({type(error).__name__}: {error}). "
            "Write one with python -m benchmarks.scaling --measure."
        ) from None
    return results


def describe_models(models: list[Model]) -> Iterator[str]:
    """The models in a table: GB are 10^9 bytes, of a rank that has it all."""
    columns = "layers x width, parameters, windows x tokens a step, GFLOP a token"
    columns += ", weights + gradients + AdamW GB, activations a window GB, the same recomputed GB"
    yield from _header("model, " + columns)
    for model in models:
        case, counts = model.case, model.counts
        whole = [Plan(model, "ddp", 1, 1, recomputes).memory() for recomputes in (False, True)]
        yield _row(
            case.name,
            f"{case.config.n_layers} x {case.config.emb_dim}",
            f"{counts.parameters:,}",
            f"{case.n_windows:,} x {case.config.context_length:,}",
            f"{counts.flop / 1e9:.2f}",
            f"{(whole[0].weights + whole[0].gradients + whole[0].optimizer) / 1e9:.1f}",
            *(f"{estimate.window / 1e9:.2f}" for estimate in whole),
        )


def describe_steps(
    model: Model, device: Device, known: list[Network], *, recompute: bool = False
) -> Iterator[str]:
    """A model's table: a row for each number of ranks and PARALLEL."""
    times = ", ".join(f"s a step at {network.name}, efficiency" for network in known)
    yield from _header(f"GPUs, PARALLEL, windows a GPU, at a time, GB a GPU, {times}")
    for ranks in RANKS:
        if model.case.n_windows % ranks:
            yield _row(f"{ranks:,}", *["–"] * (4 + 2 * len(known)))
            continue
        for parallel in PARALLEL if ranks > 1 else PARALLEL[:1]:
            plan, fits = make_plan(model, parallel, ranks, device.memory, recompute=recompute)
            cells = [f"{ranks:,}", f"`{parallel}`" if ranks > 1 else "–", f"{plan.per_rank:,}"]
            cells.append(f"{plan.at_a_time}{'*' * plan.recomputes}" if fits else "–")
            cells.append(f"{plan.total / 1e9:.1f}")
            for network in known:
                seconds = step_seconds(make_pieces(plan, device, network))
                shown = three_digits(seconds), f"{efficiency(plan, device, seconds):.0%}"
                cells += shown if fits else ("–", "–")
            yield _row(*cells)


def three_digits(number: float) -> str:
    """A positive number with three digits that count."""
    return f"{number:,.{max(0, 2 - math.floor(math.log10(number)))}f}"


def describe_measured(results: dict) -> Iterator[str]:
    """What was timed on the measured device, beside what the formula makes of it."""
    yield from _header("model, windows x tokens, s measured, s calculated")
    for name, speed in results["speed"].items():
        (case,) = (case for case in cases() if case.name == name)
        n_tokens = speed["n_tokens"] or case.config.context_length
        rows = zip(speed["windows"], speed["seconds"], speed["predicted_seconds"], strict=True)
        for n_windows, seconds, predicted in rows:
            yield _row(name, f"{n_windows} x {n_tokens:,}", f"{seconds:.2f}", f"{predicted:.2f}")


def _header(columns: str) -> Iterator[str]:
    names = columns.split(", ")
    yield _row(*names)
    yield "|" + "---|" * len(names)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def tables(
    results: dict, device: Device, known: list[Network], *, recompute: bool = False
) -> Iterator[list[str]]:
    """Every table, as lines of Markdown; the last one is of the measured device."""
    models = known_models(results)
    yield list(describe_models(models))
    for model in models:
        if model.case.name in device.flop_per_second:
            yield list(describe_steps(model, device, known, recompute=recompute))
    yield list(describe_measured(results))


def main(arguments: list[str]) -> None:
    """Print the tables, or measure this machine."""
    use_utf8()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--measure", action="store_true", help="time this machine's steps")
    parser.add_argument(
        "--device-results", type=Path, metavar="FILE", help="a device that --measure has seen"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="with activation_checkpointing everywhere"
    )
    for name, link in (("inside", "of each GPU in its node"), ("between", "of each node")):
        parser.add_argument(f"--{name}", type=float, metavar="GB_S", help=f"measured busbw {link}")
    asked = parser.parse_args(arguments)
    if asked.measure:
        measure()
        return
    given = [None if s is None else s * 1e9 for s in (asked.inside, asked.between)]
    if any(speed is not None and not speed > 0 for speed in given):
        parser.error("--inside and --between are in GB/s, and above 0")
    try:
        results = read_results(asked.device_results or RESULTS / "scaling-cpu.json")
    except ValueError as error:
        parser.error(str(error))
    device = measured_device(results) if asked.device_results else published_h100()
    say(f"{device.name}: {device.source}")
    for assumed in (Assumptions(), *networks(*given)):
        say(str(assumed))
    for lines in tables(results, device, networks(*given), recompute=asked.recompute):
        say("\n" + "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
