"""What is saved of a run, and how it is found again: weights, optimizer, best weights, the rest.

A checkpoint is a sealed folder checkpoints/step-NNNNNNNN with model.safetensors (fp32 weights),
optimizer.safetensors and state.json, random generators included. The best weights stand apart, in
best/step-NNNNNNNN; a checkpoint names the one that was the best then. Nothing in them can run
code, and nothing is loaded before its sha256 was compared.
"""

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from distributed.parallel import ALONE, Parallel
from distributed.sharding import gathered, placed
from engine.console import say, tell
from engine.errors import CheckpointError, NumericsError, SettingsError
from engine.settings import shown
from storage.files import (
    NewFolder,
    make_folder,
    remove_folder,
    remove_orphans,
    require_space,
    set_aside,
    to_json,
    verify_folder,
)

FORMAT = 1  # of a checkpoint; one with a higher number is from a newer version
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MOST_STATE_BYTES = 1 << 28
SAVING_SHARE = 0.02  # of a run's time, at most, where saves are made by the clock
DTYPES = {  # safetensors' names for them
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class BestWeights:
    """The weights with the lowest validation loss so far, by parameter name, in CPU memory."""

    step: int
    weights: dict[str, torch.Tensor]


class CheckpointStore:
    """The checkpoints of one run folder. The caller holds the folder's lock.

    Where several ranks train, all of them make the same calls together; the main one alone reads
    and writes, and what it finds or fails at is every rank's.
    """

    def __init__(
        self, run_folder: Path, run_id: str, keep: int, parallel: Parallel = ALONE
    ) -> None:
        self.checkpoints = run_folder / "checkpoints"
        self.best = run_folder / "best"
        self._run_id = run_id
        self._keep = keep
        self._parallel = parallel
        parallel.on_main(self._make_folders)

    def _make_folders(self) -> None:
        for folder in (self.checkpoints, self.best):
            make_folder(folder)
            remove_orphans(folder)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        best: BestWeights | None,
    ) -> None:
        """Commit a checkpoint and remove those that are older than the last `keep`.

        Raises NumericsError for weights that are not finite, ResourceError where the disk won't
        take it; what was there stays as it was.
        """
        weights = gathered(weights_of(model), self._parallel)
        moments = gathered(optimizer_tensors(model, optimizer), self._parallel)
        self._parallel.on_main(lambda: self._commit(step, weights, moments, state, best))

    def _commit(
        self,
        step: int,
        weights: dict[str, torch.Tensor],
        moments: dict[str, torch.Tensor],
        state: dict[str, Any],
        best: BestWeights | None,
    ) -> None:
        bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
        if bad:
            raise NumericsError(
                f"after step {step} the weights {bad[0]} are not finite: they are not saved."
            )
        new_best = best.weights if self._is_new(best) else {}
        require_space(
            self.checkpoints,
            sum(value.nbytes for group in (weights, moments, new_best) for value in group.values()),
            f"the checkpoint of step {step}",
        )
        self._write_best(best)
        state = state | {"best_step": None if best is None else best.step}
        with NewFolder(self.checkpoints / _name(step), self._facts(step)) as folder:
            folder.write(WEIGHTS, safetensors_chunks(weights))
            folder.write(OPTIMIZER, safetensors_chunks(moments))
            folder.write(STATE, [to_json(state).encode("utf-8", "backslashreplace")])
        self._prune(best)

    def save_best(self, best: BestWeights | None) -> None:
        """Commit the best weights where they are not on the disk yet."""
        self._parallel.on_main(lambda: self._write_best(best))

    def _write_best(self, best: BestWeights | None) -> None:
        if self._is_new(best):
            with NewFolder(self.best / _name(best.step), self._facts(best.step)) as folder:
                folder.write(WEIGHTS, safetensors_chunks(best.weights))

    def _is_new(self, best: BestWeights | None) -> bool:
        return best is not None and not (self.best / _name(best.step)).exists()

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], BestWeights | None] | None:
        """Load the newest checkpoint that is whole; returns its state and the best weights then.

        A damaged one is named and set aside, and the one before is tried. None where none was
        ever made. Raises CheckpointError where every one is bad, or one is from a newer version.
        """
        found = self._parallel.on_main(lambda: self._read_newest(model))
        shared = self._parallel.broadcast(None if found is None else found.without_tensors())
        if shared is None:
            return None
        found = found or shared
        load_weights(model, found.weights, found.path, self._parallel)
        load_optimizer(model, optimizer, found.moments, found.path, self._parallel)
        return found.state, found.best

    def _read_newest(self, model: nn.Module) -> "_Found | None":
        bad = [f"{path} was set aside before" for path in sorted(self.checkpoints.glob(".bad-*"))]
        for path in sorted(self.checkpoints.glob("[!.]*")):
            if path not in self._newest_first():
                say(f"Note: {path} is no checkpoint; it is left alone")
        for path in self._newest_first():
            try:
                found = self._read(path, model)
            except _Unusable as error:
                aside = set_aside(path)
                say(f"Note: {error}; it is set aside as {aside.name}")
                bad.append(str(error))
                continue
            for step, later in _steps_in(self.best):
                if step > int(path.name[5:]):  # it is done again, and not always to the last bit
                    remove_folder(later)
            if found.state["best_step"] is not None:
                found.best = self._read_best(found.state["best_step"], model)
            return found
        if bad:
            listed = "\n  ".join(bad)
            raise CheckpointError(
                f"no checkpoint in {self.checkpoints} can be used:\n  {listed}\n"
                "Another RUN_NAME, or none and RESUME = False, begins anew and leaves these alone."
            )
        return None

    def require_room(self, model: nn.Module) -> None:
        """Raise ResourceError where the disk can't take what a run that begins will keep."""
        size = sum(value.nbytes for value in weights_of(model).values())
        # weights, two moments of each, and best weights that each checkpoint may have of its own
        n_bytes = 4 * size * (self._keep + 1)
        what = f"keeping {self._keep} checkpoints and a new one"

        def require() -> None:
            if self.newest() is None:
                require_space(self.checkpoints, n_bytes, what)

        self._parallel.on_main(require)

    def newest(self) -> Path | None:
        """The newest checkpoint's folder, unverified."""
        return next(iter(self._newest_first()), None)

    def _facts(self, step: int) -> dict[str, Any]:
        return {"format": FORMAT, "run_id": self._run_id, "step": step}

    def _newest_first(self) -> list[Path]:
        return _newest_first(self.checkpoints)

    def _read(self, path: Path, model: nn.Module) -> "_Found":
        _verify(path, self._run_id, WEIGHTS, OPTIMIZER, STATE)
        with _unusable_where_unreadable(path):
            state = _read_state(path)
            weights = read_safetensors(path / WEIGHTS)
            moments = read_safetensors(path / OPTIMIZER)
        _check_names(weights, weights_of(model), path)
        return _Found(path, state, weights, moments)

    def _read_best(self, step: int, model: nn.Module) -> BestWeights | None:
        path = self.best / _name(step)
        try:
            weights = _read_best(path, self._run_id)
        except _Unusable as error:
            where = f", set aside as {set_aside(path).name}" if path.exists() else ""
            say(f"Note: the best weights are lost ({error}{where}); later ones take their place")
            return None
        _check_names(weights, weights_of(model), path)
        return BestWeights(step, weights)

    def _prune(self, best: BestWeights | None) -> None:
        newest_first = self._newest_first()
        for path in newest_first[self._keep :]:
            remove_folder(path)
        named = {_best_step(path) for path in newest_first[: self._keep]}
        named.add(best.step if best is not None else None)
        needed = {_name(step) for step in named if step is not None}
        for _, path in _steps_in(self.best):
            if path.name not in needed:
                remove_folder(path)


@dataclass
class _Found:
    """What a checkpoint holds; on other ranks than the main one without its tensors."""

    path: Path
    state: dict[str, Any]
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    best: BestWeights | None = None

    def without_tensors(self) -> "_Found":
        best = None if self.best is None else BestWeights(self.best.step, {})
        return _Found(self.path, self.state, {}, {}, best)


class _Unusable(Exception):
    """A checkpoint that is set aside."""


def read_weights(
    run_folder: Path, run_id: str, which: str = "best"
) -> tuple[int, dict[str, torch.Tensor]]:
    """A run's weights with the step they are from: the "best" so far, or the "last" ones.

    Before the first evaluation the best are the last. For a program beside the one that trains:
    it changes nothing, and begins anew where what it was reading has been removed for something
    newer. Where weights are damaged it says so and takes those saved before, or the last where
    there are no best ones before. Raises CheckpointError where none can be read, SettingsError.
    """
    if which not in ("best", "last"):
        raise SettingsError(f'which is {shown(which)}; it must be "best" or "last"')
    # the best of a finished run may be newer than its last checkpoint's record of them
    places = [run_folder / "best"] * (which == "best") + [run_folder / "checkpoints"]
    bad: dict[Path, str] = {}
    while found := [path for place in places for path in _newest_first(place) if path not in bad]:
        path = found[0]
        try:
            _verify(path, run_id, WEIGHTS, others=False)
            with _unusable_where_unreadable(path):
                return int(path.name[5:]), read_safetensors(path / WEIGHTS)
        except _Unusable as error:
            if os.path.lexists(path):
                tell(f"Note: {error}; what was saved before serves instead")
                bad[path] = str(error)
    listed = "\n  ".join(bad.values())
    raise CheckpointError(
        f"no weights in {run_folder} can be used:\n  {listed}"
        if bad
        else f"{run_folder} holds no checkpoint: the run has saved none yet."
    )


def _verify(path: Path, run_id: str, *files: str, others: bool = True) -> None:
    """Raise _Unusable for a folder that is not whole, or not what its place says."""
    try:
        facts = verify_folder(path, files, others=others)
    except CheckpointError as error:
        raise _Unusable(str(error)) from None
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {shown(facts.get('format'))}; this version reads {FORMAT}.\n"
            "It was made by another version of this program: go on with that one."
        )
    if facts.get("run_id") != run_id:
        raise _Unusable(f"{path} belongs to another run")
    step = facts.get("step")
    if not isinstance(step, int) or _name(step) != path.name:
        raise _Unusable(f"{path} holds step {shown(step)}")


@contextlib.contextmanager
def _unusable_where_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise _Unusable(f"{path} can't be read: {error}") from None


def _read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json; ValueError where it lacks what it should have."""
    if (path / STATE).stat().st_size > MOST_STATE_BYTES:
        raise ValueError(f"{STATE} is too long")
    state = json.loads((path / STATE).read_bytes())
    if not isinstance(state, dict) or not isinstance(state.get("best_step", ""), int | None):
        raise ValueError(f"{STATE} lacks what it should have")
    return state


def _read_best(path: Path, run_id: str) -> dict[str, torch.Tensor]:
    _verify(path, run_id, WEIGHTS)
    with _unusable_where_unreadable(path):
        return read_safetensors(path / WEIGHTS)


@dataclass
class SaveClock:
    """When the next checkpoint is due: every so many steps, or by time.

    By time means every so many minutes, but rarer where another save, taken to be as long as the
    last, would bring saving above SAVING_SHARE of the time so far.
    """

    every: int | None  # optimizer steps
    minutes: float

    def __post_init__(self) -> None:
        self._started_at = self._last_at = time.monotonic()
        self._spent_s = self._last_s = 0.0

    def is_due(self, step: int) -> bool:
        """Whether to save after this step."""
        if self.every is not None:
            return step % self.every == 0
        now = time.monotonic()
        share = (self._spent_s + self._last_s) / max(now - self._started_at, 1e-9)
        return now - self._last_at >= 60 * self.minutes and share <= SAVING_SHARE

    def note(self, began_at: float) -> None:
        """Note that a save, begun at this time.monotonic(), is done."""
        self._last_at = time.monotonic()
        self._last_s = self._last_at - began_at
        self._spent_s += self._last_s


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _newest_first(folder: Path) -> list[Path]:
    return [path for _, path in sorted(_steps_in(folder), reverse=True)]


def _steps_in(folder: Path) -> list[tuple[int, Path]]:
    """What stands under a step's name in a folder, with the step; nothing where it has gone."""
    return [
        (int(path.name[5:]), path)
        for path in folder.glob("step-*")
        if re.fullmatch(r"step-\d{8,}", path.name)
    ]


def _best_step(path: Path) -> int | None:
    """The step whose weights were the best when a checkpoint was made."""
    try:
        return json.loads((path / STATE).read_bytes())["best_step"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: it will be found out on resume
        return None


# -------------------------------------------------------------------------------- tensors


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's parameters by name, one that is shared only once."""
    return {name: value.detach() for name, value in model.named_parameters()}


def copy_weights(model: nn.Module, parallel: Parallel = ALONE) -> dict[str, torch.Tensor]:
    """A copy of the parameters in CPU memory; of several ranks the main one gets it, together."""
    own = weights_of(model)
    return {
        name: value.to("cpu", copy=value is own[name])
        for name, value in gathered(own, parallel).items()
    }


def load_weights(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    place: object,
    parallel: Parallel = ALONE,
) -> None:
    """Set every parameter, on several ranks by the main one's weights, together.

    Raises CheckpointError, naming place, where names or shapes don't match, or one is not fp32.
    """
    current = weights_of(model)
    parallel.on_main(lambda: _check_names(weights, current, place))
    with torch.no_grad():
        for name, value in current.items():
            value.copy_(placed(weights.get(name), value, parallel))


def assign_weights(model: nn.Module, weights: dict[str, torch.Tensor], place: object) -> None:
    """Give a model that was built on the "meta" device its parameters, uncopied.

    Raises CheckpointError, naming place, where names or shapes don't match, or one is not fp32.
    """
    _check_names(weights, weights_of(model), place)
    model.load_state_dict(weights, strict=False, assign=True)  # a shared one has one name here
    model.tie_head()


def _check_names(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], place: object
) -> None:
    odd = sorted(found.keys() ^ expected.keys())
    odd += [
        name
        for name in sorted(found.keys() & expected.keys())
        if (found[name].shape, found[name].dtype) != (expected[name].shape, torch.float32)
    ]
    if odd:
        raise CheckpointError(
            f"{place} does not fit the model: {', '.join(name[:80] for name in odd[:3])} "
            f"{'are' if len(odd) > 1 else 'is'} missing, unknown, of another shape or not fp32."
        )


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state as "kind.parameter" (say "exp_avg.head.weight") -> tensor."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}.{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, torch.Tensor],
    place: object,
    parallel: Parallel = ALONE,
) -> None:
    """Set the optimizer's state; its settings stay as they are, for they come from the run's own.

    On several ranks it is the main one's tensors that count, together. Raises CheckpointError,
    naming place, for state that has no place in the model, or that only some of its parameters
    have.
    """
    parameters = dict(model.named_parameters())
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {parameter: i for i, parameter in enumerate(order)}

    def require_fit() -> None:
        kinds: dict[int, set[str]] = {i: set() for i in range(len(order))}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            parameter = parameters.get(name)
            # a moment of another size would be read past its end
            if parameter not in index or value.shape != (() if kind == "step" else parameter.shape):
                raise CheckpointError(
                    f"{place} does not fit the model: {key[:80]} has no place in it."
                )
            kinds[index[parameter]].add(kind)
        # Muon and AdamW have no kind in common: where two parameters share one, they share all
        of_any = {frozenset(found) for found in kinds.values()}
        if tensors and (frozenset() in of_any or any(a & b for a, b in combinations(of_any, 2))):
            raise CheckpointError(f"{place} does not fit the model: it lacks state of a parameter.")

    parallel.on_main(require_fit)
    state: dict[int, dict[str, torch.Tensor]] = {}
    scalar = torch.zeros(())
    for key in parallel.broadcast(list(tensors)):
        kind, _, name = key.partition(".")
        parameter = parameters[name]
        like = scalar if kind == "step" else parameter.detach()
        state.setdefault(index[parameter], {})[kind] = placed(tensors.get(key), like, parallel)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def safetensors_chunks(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: its header, then each tensor's memory, never copied on CPUs.

    The library's own writer takes a second copy of everything, and hashes and fsyncs nothing.
    Format: github.com/huggingface/safetensors.
    """
    header, start = {}, 0
    # wide numbers first, as the library does, so that each tensor is aligned
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, value in ordered:
        header[name] = {
            "dtype": DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, start + value.nbytes],
        }
        start += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, value in ordered:
        flat = value.detach().to("cpu").contiguous().flatten()
        if flat.numel():
            yield memoryview(flat.view(torch.uint8).numpy())


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, in CPU memory.

    Raises SafetensorError for a file that is none, OSError for one that can't be read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # cloned: what the library gives may be the file itself, mapped into memory
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except AttributeError as error:  # the library asks torch for the format by its name
        raise SafetensorError(f"not fp32, and this torch has no {error.name}") from error
    except RuntimeError:
        if path.exists():
            raise
        # the library opens a file twice, and this one was removed in between
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None


# ---------------------------------------------------------------------- random generators
