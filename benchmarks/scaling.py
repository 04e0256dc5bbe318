"""A model of scaling: memory a rank and time a step on 1 to 1,024 GPUs, with DDP and FSDP2.

    python -m benchmarks.scaling [--recompute] [--device-results FILE] [--inside GB_S]
                                 [--between GB_S]
    python -m benchmarks.scaling --measure

Parameters and operations are counted on the real model, activations are measured. Without
--device-results a GPU's speed is a published one, not measured here; --measure writes a file that
replaces it, on a CPU or GPU. Network and Assumptions have what is assumed of the network.
docs/scaling.md explains the tables.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks import train
from benchmarks.report import RESULTS, machine, write_results
from benchmarks.steps import BF16_PEAKS
from engine.console import say, use_utf8
from engine.errors import is_out_of_memory
from engine.memory import (
    OPTIMIZER_BYTES,
    MemoryEstimate,
    available_memory,
    halved,
    head_bytes,
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
# windows, n_layers and n_tokens that --measure times, as benchmarks/train.py does; a model with
# fewer layers has the same speed, but for the head's larger share
SIZES = {
    "cpu": {"124M": (4, 12, 256)},
    "cuda": {"124M": (32, 12, 1024), "1.5B": (16, 8, 1024), "7B": (4, 4, 4096)},
}


class Activations(NamedTuple):
    """Bytes that a model of one block keeps for its backward pass, and those of each further one.

    fixed does not depend on the micro-batch: the weights in bf16, which FSDP2 does not keep.
    """

    fixed: int
    fixed_block: int
    window: int
    window_block: int


class Case(NamedTuple):
    """A model and the windows of an optimizer step on all ranks."""

    name: str
    config: GPTConfig
    n_windows: int
    published_mfu: float  # of an H100's dense bf16 peak, by 6N + 12LHDT
    source: str
    kept: Activations | None = None  # None if not measured yet


def cases() -> list[Case]:
    """The three models. None has dropout, and 124M is otherwise config.json's."""
    models, _ = read_models(MODELS_FILE)
    small = models["gpt2-124m"] | {"vocab_size": 50257, "drop_rate": 0.0}
    xl = small | {"n_layers": 48, "emb_dim": 1600, "n_heads": 25}
    llama: dict[str, Any] = {"vocab_size": 32000, "context_length": 4096}
    llama |= {"emb_dim": 4096, "n_heads": 32}
    llama |= {"n_layers": 32, "architecture": "llama", "tie_embeddings": False}
    return [
        Case("124M", GPTConfig(**small), 512, 0.41, "llm.c, 124M on 8 H100"),
        Case("1.5B", GPTConfig(**xl), 1024, 0.46, "nanochat d18, some 0.5B, on 8 H100"),
        Case("7B", GPTConfig(**llama), 1024, 0.39, "torchtitan, Llama 3 8B on 8 H100, compiled"),
    ]


class Counts(NamedTuple):
    """Parameters, and a token's floating point operations, forward and backward."""

    parameters: int
    block: int  # one block's Linear modules, which FSDP2 all-gathers in bf16
    root: int  # the others, which it all-gathers in fp32
    flop: float
    block_flop: float
    head_flop: float
    head_weight: torch.Tensor  # on the meta device


@functools.cache
def count(config: GPTConfig) -> Counts:
    """Count on the real model, built on the meta device."""
    with torch.device("meta"):
        model = GPTModel(config)
    linear = [layer for layer in model.blocks[0].modules() if isinstance(layer, nn.Linear)]
    block = sum(p.numel() for layer in linear for p in layer.parameters())
    parameters, flop = model.count_parameters(), model.flop_per_token()
    head_flop = 6 * model.head.weight.numel()
    block_flop = (flop - head_flop) / config.n_layers
    root = parameters - config.n_layers * block
    return Counts(parameters, block, root, flop, block_flop, head_flop, model.head.weight)


def measure_few_layers(config: GPTConfig, device: torch.device) -> Activations:
    """Measure a model of this width with one block, and with two, whose weights are zeros."""
    measured = []
    for n_layers in (1, 2):
        with torch.device("meta"):
            # a small vocabulary: of it only the weights are kept
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
class Assumptions:
    """What is neither counted nor measured."""

    reserved: float = 4e9  # of a GPU's memory: CUDA, NCCL's buffers, fragmentation
    launched_s: float = 90 * 5e-6  # an uncompiled block's kernels times the launch time of each
    # memory traffic of a parameter: AdamW 28, the norm of the gradient 4, clipping it 8
    once_bytes: float = 40.0
    overlap: float = 0.9  # the share of a message that overlaps with computation
    bucket: float = 25 * 2**20  # the bytes of a DDP bucket
    # gloo's all-reduce of flags, twice around the ring of ranks
    agree_hop_s: float = 30e-6


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Network:
    """Bandwidths (busbw in nccl-tests) and the latencies of a hop."""

    name: str
    inside: float  # B/s of each GPU to others in its node, in one direction
    between: float  # B/s of each node to others, over all its adapters, in one direction
    inside_hop_s: float = 2e-6
    between_hop_s: float = 5e-6
    gpus_per_node: int = 8

    def all_reduce_s(self, size: float, ranks: int) -> float:
        """The time to all-reduce `size` bytes, by ring or tree, whichever has less latency."""
        nodes, inside = -(-ranks // self.gpus_per_node), min(ranks, self.gpus_per_node)
        tree_s = math.ceil(math.log2(inside)) * self.inside_hop_s
        tree_s += math.ceil(math.log2(nodes)) * self.between_hop_s
        return 2 * (self._moving_s(size, ranks) + min(self._ring_s(ranks), tree_s))

    def gather_s(self, size: float, ranks: int) -> float:
        """The time to all-gather or reduce-scatter `size` bytes in total."""
        return self._moving_s(size, ranks) + self._ring_s(ranks)

    def _moving_s(self, size: float, ranks: int) -> float:
        is_one_node = ranks <= self.gpus_per_node
        speed = self.inside if is_one_node else min(self.inside, self.between)
        return (ranks - 1) / ranks * size / speed

    def _ring_s(self, ranks: int) -> float:
        nodes = -(-ranks // self.gpus_per_node)
        between = nodes if nodes > 1 else 0
        return (ranks - 1 - between) * self.inside_hop_s + between * self.between_hop_s


def networks(inside: float | None = None, between: float | None = None) -> list[Network]:
    """Two assumed networks of nodes with 8 GPUs and NVLink, at 80% of the links' rates.

    The first has a 400 Gb/s adapter for each GPU, the second one of 100 Gb/s for all 8. A given
    bandwidth, in B/s, replaces the assumed one and leaves one network.
    """
    nvlink, fast, slow = 0.8 * 450e9, 0.8 * 8 * 50e9, 0.8 * 12.5e9
    if inside is not None or between is not None:
        return [Network("as given", inside or nvlink, between or fast)]
    return [Network("400 Gb/s a GPU", nvlink, fast), Network("100 Gb/s a node", nvlink, slow)]


class Device(NamedTuple):
    """A GPU or CPU; flop_per_second has the cases whose speed is known."""

    name: str
    memory: float  # bytes for training
    flop_per_second: dict[str, float]
    once_s_per_parameter: float  # clipping and optimizer, for each parameter on a rank
    launched_s: float  # the host's time to launch a block's kernels, forward and backward
    source: str


def published_h100() -> Device:
    """An H100 SXM of 80 GB, by its data sheet and others' published results."""
    return Device(
        "H100 SXM, 80 GB",
        80e9 - ASSUMED.reserved,
        {case.name: case.published_mfu * BF16_PEAKS["H100"] for case in cases()},
        ASSUMED.once_bytes / (0.9 * 3.35e12),
        ASSUMED.launched_s,
        "published, not measured here: "
        + "; ".join(f"{case.name} {case.published_mfu:.0%} ({case.source})" for case in cases()),
    )


def read_results(path: Path) -> tuple[Device, list[Case]]:
    """The device that --measure measured, whose speeds include clipping and optimizer, and the
    cases with their activations."""
    results = json.loads(path.read_text(encoding="utf-8"))
    facts, memory = results["machine"], results["memory"]
    on_gpu = facts["device"] != "cpu"
    device = Device(
        facts["name"],
        math.inf if memory is None else memory - on_gpu * ASSUMED.reserved,
        results["flop_per_second"],
        0.0,
        on_gpu * ASSUMED.launched_s,
        f"measured on {facts['name']} with {facts['threads']} of its host's threads, "
        f"torch {facts['torch']}",
    )
    kept = results["activations"]
    return device, [case._replace(kept=Activations(**kept[case.name])) for case in cases()]


class Plan(NamedTuple):
    """How the ranks divide a step."""

    case: Case
    parallel: str  # "ddp" or "fsdp"
    ranks: int
    micro_batch: int  # windows of a micro-batch
    recomputes: bool  # activation_checkpointing

    @property
    def per_rank(self) -> int:
        """A rank's windows of a step."""
        return self.case.n_windows // self.ranks

    @property
    def accumulation(self) -> int:
        """The micro-batches of a step."""
        return -(-self.per_rank // self.micro_batch)

    def memory(self) -> MemoryEstimate:
        """The peak memory of a step on a rank's GPU, by use."""
        counts, kept, config = count(self.case.config), self.case.kept, self.case.config
        assert kept is not None, "read_results() has filled it in"
        # recomputed: each block's input is kept, and one block's activations at a time
        further = 0 if self.recomputes else config.n_layers - 1
        into_blocks = config.n_layers * config.context_length * config.emb_dim * FP32
        window = kept.window + further * kept.window_block + self.recomputes * into_blocks
        fixed = kept.fixed + further * kept.fixed_block
        weights = gradients = FP32 * counts.parameters
        optimizer = OPTIMIZER_BYTES["adamw"][0] * counts.parameters
        if self.parallel == "fsdp":
            fixed, shard = 0, weights // self.ranks
            # micro-batches before the last leave their gradients unsharded
            unsharded = FP32 * config.n_layers * counts.block if self.accumulation > 1 else 0
            # besides the shards: two blocks in bf16 and the root in fp32; a block's gradient in
            # bf16, and in fp32 for the reduce-scatter; the root's gradient
            weights = shard + 2 * BF16 * counts.block + FP32 * counts.root
            gradients = shard + unsharded + (BF16 + FP32) * counts.block + FP32 * counts.root
            optimizer //= self.ranks
        n_rows = self.micro_batch * config.context_length
        head = head_bytes(counts.head_weight, n_rows, GPU_BF16)
        return MemoryEstimate(weights, gradients, optimizer, 0, fixed, window, head)

    @property
    def total(self) -> int:
        """The peak memory in bytes."""
        return self.memory().total(self.micro_batch)


def make_plan(
    case: Case, parallel: str, ranks: int, room: float, *, recompute: bool = False
) -> tuple[Plan, bool]:
    """The plan with the largest micro-batch that fits into room bytes, and whether one does.

    Blocks are recomputed only where nothing fits otherwise, or where recompute is True.
    """
    for recomputes in (True,) if recompute else (False, True):
        plan = Plan(case, parallel, ranks, case.n_windows // ranks, recomputes)
        while plan.total > room and plan.micro_batch > 1:
            plan = plan._replace(micro_batch=halved(plan.micro_batch))
        if plan.total <= room:
            break
    return plan, plan.total <= room


class Pieces(NamedTuple):
    """The times that make up a rank's step, in seconds, of a block or of the root."""

    n_layers: int
    accumulation: int
    forward: float
    backward: float
    head: float  # with its loss, forward and backward
    once: float  # clipping and optimizer
    gather: float  # all-gather of a block's weights
    gather_root: float
    reduce: float  # all-reduce or reduce-scatter of a block's gradients
    reduce_root: float
    launch: float  # the host's time for a block
    launch_backward: float
    agree: float  # the hosts' all-reduce at the end


def make_pieces(plan: Plan, device: Device, network: Network) -> Pieces:
    """The times of a step: operations over speed, bytes over bandwidth, hops times latency."""
    counts, config, ranks = count(plan.case.config), plan.case.config, plan.ranks
    n_tokens = plan.per_rank * config.context_length / plan.accumulation
    token_s = n_tokens / device.flop_per_second[plan.case.name]
    backward = 1 if plan.recomputes else 2 / 3  # of a block's forward and backward
    sharded = plan.parallel == "fsdp"

    def reduced(size: float) -> float:
        if sharded:
            return network.gather_s(size, ranks)
        n_messages = max(1, round(size / ASSUMED.bucket))
        return n_messages * network.all_reduce_s(size / n_messages, ranks)

    return Pieces(
        config.n_layers,
        plan.accumulation,
        forward=token_s * counts.block_flop / 3,
        backward=token_s * counts.block_flop * backward,
        head=token_s * counts.head_flop,
        once=device.once_s_per_parameter * counts.parameters / (ranks if sharded else 1),
        gather=sharded * network.gather_s(BF16 * counts.block, ranks),
        gather_root=sharded * network.gather_s(FP32 * counts.root, ranks),
        reduce=reduced(FP32 * counts.block),
        reduce_root=reduced(FP32 * counts.root),
        launch=device.launched_s / 3,
        launch_backward=device.launched_s * backward,
        agree=2 * (ranks - 1) * ASSUMED.agree_hop_s,
    )


def step_seconds(p: Pieces) -> float:
    """The time of a step, in which a block takes as long as its computation or its communication.

    The first all-gather of each pass and the last reduction overlap with nothing. A GPU that has
    less to do than its host waits for it.
    """

    def blocks(computing: float, message: float) -> float:
        beside = computing + (1 - ASSUMED.overlap) * message
        return p.gather + (p.n_layers - 1) * max(beside, message) + computing

    forward = p.gather_root + blocks(p.forward, p.gather) + p.head
    last = blocks(p.backward, p.gather + p.reduce) + p.reduce + p.reduce_root
    earlier = (p.accumulation - 1) * blocks(p.backward, p.gather)
    host = p.accumulation * p.n_layers * (p.launch + p.launch_backward) + p.agree
    return max(p.accumulation * forward + earlier + last + p.once, host)


def efficiency(plan: Plan, device: Device, seconds: float) -> float:
    """One GPU's time for the step, had it the memory, divided by the ranks' total time."""
    case, counts = plan.case, count(plan.case.config)
    n_tokens = case.n_windows * case.config.context_length
    alone = n_tokens * counts.flop / device.flop_per_second[case.name]
    return (alone + device.once_s_per_parameter * counts.parameters) / (plan.ranks * seconds)


def measure() -> None:
    """Measure this machine's best device and write the file for --device-results."""
    device = pick_device(None)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[1] if on_gpu else available_memory(device)
    activations = {case.name: measure_few_layers(case.config, device)._asdict() for case in cases()}
    speeds = {}
    for case in (case for case in cases() if case.name in SIZES[device.type]):
        n_windows, n_layers, n_tokens = SIZES[device.type][case.name]
        config = replace(case.config, n_layers=n_layers, context_length=n_tokens)
        timed = train.Case(case.name, config, n_windows, steps=6)
        try:
            row = train.measure(timed, device, choose_precision("auto", device))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            say(f"{case.name}: there is too little memory here to measure it")
            continue
        speeds[case.name] = row["flop_per_second"]
        say(f"{case.name}: {speeds[case.name] / 1e9:,.0f} GFLOP/s")
    if not speeds:
        sys.exit("nothing could be measured, so nothing is written")
    results = {"machine": machine(device), "memory": memory, "activations": activations}
    say(f"written to {write_results('scaling', device, results | {'flop_per_second': speeds})}")


def describe_models(models: list[Case]) -> Iterator[list[str]]:
    """The rows of a table of the models; GB are 10^9 bytes, on a single rank."""
    columns = "model, layers x width, parameters, windows x tokens a step, GFLOP a token"
    columns += ", weights + gradients + AdamW GB, activations a window GB, the same recomputed GB"
    yield columns.split(", ")
    for case in models:
        config, counts = case.config, count(case.config)
        plan = Plan(case, "ddp", 1, 1, False)
        needed, recomputed = plan.memory(), plan._replace(recomputes=True).memory()
        yield [
            case.name,
            f"{config.n_layers} x {config.emb_dim}",
            f"{counts.parameters:,}",
            f"{case.n_windows:,} x {config.context_length:,}",
            f"{counts.flop / 1e9:.2f}",
            f"{(needed.weights + needed.gradients + needed.optimizer) / 1e9:.1f}",
            f"{needed.window / 1e9:.2f}",
            f"{recomputed.window / 1e9:.2f}",
        ]


def describe_steps(
    case: Case, device: Device, known: list[Network], *, recompute: bool
) -> Iterator[list[str]]:
    """The rows of a model's table, one for each number of ranks and PARALLEL."""
    times = ", ".join(f"s a step at {network.name}, efficiency" for network in known)
    yield f"GPUs, PARALLEL, windows a GPU, micro-batch, GB a GPU, {times}".split(", ")
    for ranks in RANKS:
        if case.n_windows % ranks:
            yield [f"{ranks:,}", *["–"] * (4 + 2 * len(known))]
            continue
        for parallel in PARALLEL if ranks > 1 else PARALLEL[:1]:
            plan, fits = make_plan(case, parallel, ranks, device.memory, recompute=recompute)
            row = [f"{ranks:,}", f"`{parallel}`" if ranks > 1 else "–", f"{plan.per_rank:,}"]
            micro_batch = f"{plan.micro_batch}{'*' * plan.recomputes}" if fits else "–"
            row += [micro_batch, f"{plan.total / 1e9:.1f}"]
            for network in known:
                seconds = step_seconds(make_pieces(plan, device, network))
                shown = three_digits(seconds), f"{efficiency(plan, device, seconds):.0%}"
                row += shown if fits else ("–", "–")
            yield row


def three_digits(number: float) -> str:
    """A positive number with three significant digits."""
    return f"{number:,.{max(0, 2 - math.floor(math.log10(number)))}f}"


def tables(
    models: list[Case], device: Device, known: list[Network], *, recompute: bool = False
) -> Iterator[list[str]]:
    """Every table, as lines of Markdown."""
    found = [describe_models(models)]
    for case in (case for case in models if case.name in device.flop_per_second):
        found += [describe_steps(case, device, known, recompute=recompute)]
    for header, *rows in found:
        lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
        yield [lines[0], "|" + "---|" * len(header), *lines[1:]]


def main(arguments: list[str]) -> None:
    """Print the tables, or measure this machine."""
    use_utf8()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--measure", action="store_true", help="measure this machine")
    parser.add_argument("--device-results", type=Path, metavar="FILE", help="that --measure wrote")
    parser.add_argument("--recompute", action="store_true", help="activations, in every row")
    for name, link in (("inside", "of each GPU in its node"), ("between", "of each node")):
        parser.add_argument(f"--{name}", type=float, metavar="GB_S", help=f"measured busbw {link}")
    asked = parser.parse_args(arguments)
    if asked.measure:
        measure()
        return
    given = [None if s is None else s * 1e9 for s in (asked.inside, asked.between)]
    if any(speed is not None and not speed > 0 for speed in given):
        parser.error("--inside and --between are in GB/s, and above 0")
    path = asked.device_results or RESULTS / "scaling-cpu.json"
    try:
        device, models = read_results(path)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        parser.error(
            f"{path} can't be read as results of --measure ({type(error).__name__}: {error}). "
            "Write one with python -m benchmarks.scaling --measure."
        )
    if not asked.device_results:
        device = published_h100()
    say(f"{device.name}: {device.source}")
    for assumed in (ASSUMED, *networks(*given)):
        say(str(assumed))
    for lines in tables(models, device, networks(*given), recompute=asked.recompute):
        say("\n" + "\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
