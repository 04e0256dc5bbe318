"""How fast a machine trains: a few steps of two or three small models, timed once and kept."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from engine.console import say
from engine.devices import synchronize
from engine.errors import is_out_of_memory
from engine.memory import available_memory
from engine.optim import build_optimizer
from engine.processor import is_held_up, using_threads
from engine.randomness import random_state, set_random_state
from model import GPTConfig, GPTModel
from planning.law import layer_sizes, step_costs
from planning.machine import Machine
from planning.recipe import MachineFacts, in_digits
from training.learner import Learner, Step

MOST_SHARE = 0.03  # of the minutes, for the measurement; a step that has begun is not cut short
TIMED_STEPS = 3  # of each model, after one to warm up
# a step of the next model, by one of the last: operations tell too much where overhead rules
MOST_RATIO = 8.0
UNKNOWN_MEMORY = 4 * 10**9  # bytes, assumed where the system won't tell
GPU_PARAMETER_S = 2e-11
# seconds an operation, a token, a parameter and a layer, assumed where too few steps are timed
USUAL_CPU = np.array([1 / 6e11, 15e-6, 1e-9, 0.0])
USUAL_GPU = np.array([1 / 2e13, 1e-8, GPU_PARAMETER_S, 3e-4])


@dataclass(frozen=True)
class StepTime:
    """The fastest of some timed steps."""

    seconds: float
    held_up: bool  # other work took part of them


@dataclass(frozen=True)
class Probe:
    """A model and a batch whose step is timed."""

    layers: int
    width: int
    vocabulary: int
    context: int
    windows: int

    def costs(self) -> np.ndarray:
        """What a step is made of, as step_costs() says: operations, tokens, parameters, layers."""
        values = (self.layers, self.width, self.vocabulary, self.context, self.windows)
        in_layer, _ = layer_sizes(self.width, {})
        return np.array(step_costs(*map(float, values), in_layer=in_layer), dtype=np.float64)


# the first is ruled by what each token or layer costs, the last by large products and the optimizer
CPU_PROBES = (Probe(2, 64, 512, 64, 16), Probe(4, 192, 1024, 128, 8), Probe(6, 384, 512, 128, 4))
GPU_PROBES = (
    Probe(4, 128, 512, 128, 16),
    Probe(6, 384, 4096, 256, 64),
    Probe(12, 768, 4096, 512, 16),
)


def measure_speed(machine: Machine, minutes: float) -> MachineFacts:
    """How fast the machine trains, from the cache or measured in some 3 % of the minutes.

    A measurement takes at least a step, however short the minutes. With several ranks it is the
    speed of all of them, with NIGHT_MODE that of the machine's share. Prints the figures.
    """
    device, choices = machine.device, machine.choices
    question = f"the speed of training steps in {machine.precision.name}"
    known = None if choices is None else choices.known(question)
    names = ("flops", "token_s", "parameter_s", "layer_s")
    if known is not None and set(known) == set(names) and known["flops"] > 0:
        figures, how = known, "as measured before"
    else:
        started_at = time.perf_counter()
        probes = CPU_PROBES if device.type == "cpu" else GPU_PROBES
        times = _time_probes(machine, probes, MOST_SHARE * 60 * minutes)
        seconds = [step.seconds for step in times]
        figures = solve([probe.costs() for probe in probes], seconds, device.type)
        how = f"measured in {time.perf_counter() - started_at:.1f} s"
        # beside other work the machine looks slow, which must not last; the largest model tells
        if times[-1].held_up:
            how += ", beside other work: a later run measures it again"
        elif choices is not None and len(times) == len(probes):
            choices.keep(question, figures)
    memory = available_memory(device) or UNKNOWN_MEMORY
    if machine.is_shared and device.type != "cpu":
        memory //= 2
    world, shared = machine.parallel.world, machine.parallel.local_world
    facts = MachineFacts(
        device=device.type,
        flops=figures["flops"] * world,
        token_s=figures["token_s"] / world,
        parameter_s=figures["parameter_s"],
        memory=memory // shared if device.type == "cpu" else memory,
        layer_s=figures["layer_s"],
    ).rounded()
    shown = asdict(facts)
    say(
        f"Speed: {in_digits(shown['flops'] / 1e9, 3)} GFLOP/s in training steps, "
        f"{in_digits(1e6 * shown['token_s'], 2)} µs a token, "
        f"{in_digits(1e9 * shown['parameter_s'], 2)} ns a parameter and "
        f"{in_digits(1e3 * shown['layer_s'], 2)} ms a layer in each ({how})"
    )
    return facts


def _threads(machine: Machine) -> int:
    return torch.get_num_threads() if machine.choices is None else machine.choices.threads


def _time_probes(machine: Machine, probes: Sequence[Probe], most_s: float) -> list[StepTime]:
    """The times of the probes' steps; at least of one, the others while there is time."""
    device, times = machine.device, list[StepTime]()
    random_before, started_at = random_state(device), time.perf_counter()
    try:
        with using_threads(_threads(machine)):
            for probe in probes:
                if times:
                    ratio = probe.costs()[0] / probes[len(times) - 1].costs()[0]
                    expected = times[-1].seconds * min(ratio, MOST_RATIO)
                    if time.perf_counter() - started_at + expected > most_s:
                        break
                try:
                    times.append(_time_steps(machine, probe, most_s / len(probes)))
                except (MemoryError, RuntimeError) as error:
                    if not times or not is_out_of_memory(error):
                        raise
                    break  # what does not fit here is not chosen here either
    finally:
        set_random_state(random_before, device)
    return times


def _time_steps(machine: Machine, probe: Probe, most_s: float) -> StepTime:
    """The fastest of some steps on random tokens; stops after most_s."""
    device = machine.device
    config = GPTConfig(
        vocab_size=probe.vocabulary,
        context_length=probe.context,
        emb_dim=probe.width,
        n_heads=max(1, probe.width // 64),
        n_layers=probe.layers,
        architecture="llama",
        qk_norm=True,
        zero_init=True,
    )
    model = GPTModel(config).to(device).train()
    learner = Learner(model, build_optimizer("muon", model, 1e-3, 0.1), machine.precision)
    shape = (2, probe.windows, probe.context)
    ids, targets = torch.randint(probe.vocabulary, shape).to(device)
    step = Step([(ids, targets)], targets.numel(), probe.windows)
    steps, began_at = list[tuple[float, float]](), time.perf_counter()
    for number in range(1 + TIMED_STEPS):
        started_at, cpu_before = time.perf_counter(), time.thread_time()
        learner.try_step(step, 1.0)
        synchronize(device)
        seconds, cpu_s = time.perf_counter() - started_at, time.thread_time() - cpu_before
        is_late = time.perf_counter() - began_at > most_s
        if number > 0 or is_late:
            steps.append((seconds, cpu_s))
        if is_late:
            break
    seconds, cpu_s = min(steps)
    return StepTime(seconds, device.type == "cpu" and is_held_up(cpu_s, seconds))


def solve(costs: list[np.ndarray], seconds: list[float], device: str) -> dict[str, float]:
    """The figures of MachineFacts from the costs of steps, (4,) each, and their seconds.

    Least squares of the relative errors, with no figure below 0. What the timed steps can't tell
    has its usual value: a layer's own time on a CPU, a parameter's on a GPU. After a single step
    all usual values are multiplied by one factor.
    """
    assumed = USUAL_CPU if device == "cpu" else USUAL_GPU
    rows = np.array(costs[: len(seconds)]) / np.array(seconds)[:, None]
    if len(seconds) == 1:
        return _figures(assumed / (rows[0] @ assumed))
    usual = assumed * np.array([0, 0, 1, 0])
    order = (0, 1, 2) if device == "cpu" else (0, 3, 1)
    best: tuple[float, np.ndarray] | None = None
    for mask in range(2 ** (len(order) - 1)):
        free = [0] + [order[1 + bit] for bit in range(len(order) - 1) if mask >> bit & 1]
        if len(free) > len(seconds):
            continue
        values = usual.copy()
        values[free] = 0.0
        found = np.linalg.lstsq(rows[:, free], 1 - rows @ values, rcond=None)[0]
        values[free] = found
        if found[0] <= 0 or (found < 0).any():
            continue
        error = float(((rows @ values - 1) ** 2).sum())
        if best is None or error < best[0] - 1e-9:
            best = error, values
    if best is None:  # steps faster than their parameters alone: all time is the products'
        best = 0.0, np.array([1 / rows[:, 0].max(), 0.0, 0.0, 0.0])
    return _figures(best[1])


def _figures(values: np.ndarray) -> dict[str, float]:
    """The seconds an operation, a token, a parameter and a layer, (4,), by MachineFacts' names."""
    inverse, token_s, parameter_s, layer_s = values.tolist()
    return {
        "flops": 1 / inverse,
        "token_s": token_s,
        "parameter_s": parameter_s,
        "layer_s": layer_s,
    }
