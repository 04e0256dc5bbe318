"""The checkpoints of a run: saved, found again and loaded.

A checkpoint is a folder checkpoints/step-NNNNNNNN with model.safetensors (fp32 weights),
optimizer.safetensors and state.json, which has the random generators too. The best weights have
their own folder best/step-NNNNNNNN, and each checkpoint names the step of its best weights. No
file can run code, and none is loaded before its sha256 is verified.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from distributed.parallel import ALONE, Parallel
from distributed.sharding import gathered, placed
from engine.console import say, tell
from engine.errors import CheckpointError, NumericsError, SettingsError
from engine.lora import adapter_of, merged
from engine.settings import shown
from storage.files import (
    MANIFEST,
    NewFolder,
    make_folder,
    remove_folder,
    remove_orphans,
    require_space,
    set_aside,
    to_json,
    verify_folder,
)

FORMAT = 1  # of a checkpoint; no other is read
WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FROZEN = "frozen"  # the folder of the weights that an adapter is for
MOST_STATE_BYTES = 1 << 28
SPARE = 2  # checkpoints to keep, at most, of which a finished run keeps the last alone
SAVING_SHARE = 0.02  # of a run's time, at most, if saves are made by time
RETRY_S, MOST_RETRY_S = 5.0, 600.0  # from a failed save to the next try, doubled each time
DTYPES = {  # their names in safetensors
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
Tensors = dict[str, torch.Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class BestWeights:
    """The weights with the lowest validation loss so far, by parameter name, in CPU memory."""

    step: int
    weights: Tensors | None  # None: only in the run's folder


class CheckpointStore:
    """The checkpoints of one run folder. The caller holds the folder's lock.

    All methods but newest() are collectives: every rank calls them. Only the main rank reads and
    writes; all ranks get its result, or raise its error. With best_on_disk the best weights are
    written at once, and take no memory.
    """

    def __init__(
        self,
        run_folder: Path,
        run_id: str,
        keep: int,
        parallel: Parallel = ALONE,
        *,
        best_on_disk: bool = False,
    ) -> None:
        self._run_folder = run_folder
        self.checkpoints = run_folder / "checkpoints"
        self.best = run_folder / "best"
        self._run_id = run_id
        self._keep = keep
        self._parallel = parallel
        self.best_on_disk = best_on_disk
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
        """Commit a checkpoint and remove all but the newest `keep`.

        Raises NumericsError for weights that are not finite, ResourceError if the disk refuses;
        the old checkpoints are then unchanged.
        """
        weights = gathered(weights_of(model), self._parallel)
        moments = gathered(optimizer_tensors(model, optimizer), self._parallel)

        def commit() -> None:
            for name, value in weights.items():
                if not torch.isfinite(value).all():
                    raise NumericsError(
                        f"after step {step} the weights {name} are not finite: they are not saved."
                    )
            new_best = {} if best is None or self._has(best) else best.weights or {}
            tensors = [*weights.values(), *moments.values(), *new_best.values()]
            n_bytes = sum(value.nbytes for value in tensors)
            require_space(self.checkpoints, n_bytes, f"the checkpoint of step {step}")
            self._write_best(best)
            content = to_json(state | {"best_step": best and best.step})
            with NewFolder(self.checkpoints / _name(step), self._facts(step)) as folder:
                folder.write(WEIGHTS, safetensors_chunks(weights))
                folder.write(OPTIMIZER, safetensors_chunks(moments))
                folder.write(STATE, [content.encode("utf-8", "backslashreplace")])
            self._prune(best, self._keep)

        self._parallel.on_main(commit)

    def keep_best(self, step: int, model: nn.Module) -> BestWeights:
        """Keep a model's weights as the best ones; ResourceError if they are to go to the disk, and
        that refuses."""
        if not self.best_on_disk:
            return BestWeights(step, copy_weights(model, self._parallel))
        best = BestWeights(step, gathered(weights_of(model), self._parallel))

        def write() -> None:
            remove_folder(self.best / _name(step))  # of an earlier process, after its checkpoint
            n_bytes = sum(value.nbytes for value in (best.weights or {}).values())
            require_space(self.best, n_bytes, f"the best weights, of step {step}")
            self._write_best(best)
            self._prune(best, self._keep)

        self._parallel.on_main(write)
        return replace(best, weights=None)

    def keep_frozen(self, model: nn.Module) -> None:
        """Write the frozen weights of a model with LoRA, once a run: checkpoints lack them."""
        frozen = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}

        def write() -> None:
            place = self._run_folder / FROZEN
            if not frozen or (place / _name(0)).exists():
                return
            make_folder(place)
            remove_orphans(place)
            n_bytes = sum(value.nbytes for value in frozen.values())
            require_space(place, n_bytes, "a copy of the frozen weights")
            with NewFolder(place / _name(0), self._facts(0)) as folder:
                folder.write(WEIGHTS, safetensors_chunks(frozen))

        self._parallel.on_main(write)

    def weights_of_best(self, best: BestWeights, model: nn.Module) -> Tensors | None:
        """The best weights, {} on ranks other than the main one; None if they are lost."""
        if best.weights is not None:
            return best.weights
        found = self._parallel.on_main(lambda: self._read_best(best.step, model))
        is_lost = self._parallel.broadcast(found is None)
        return None if is_lost else (found and found.weights) or {}

    def save_best(self, best: BestWeights | None) -> None:
        """Commit the best weights of a finished run, and remove what it does not need any more.

        It keeps the best weights and the last checkpoint, which can be gone on from; with more
        than SPARE of them asked for, all of those.
        """

        def finish() -> None:
            self._write_best(best)
            if self._keep > SPARE:
                return
            self._prune(best, keep=1)
            newest = self.newest()
            if best is not None and newest is not None and best.step == _step_of(newest):
                for path in _newest_first(self.best)[1:]:  # those before the last evaluation
                    remove_folder(path)

        self._parallel.on_main(finish)

    def _write_best(self, best: BestWeights | None) -> None:
        if best is None or best.weights is None or self._has(best):
            return
        name = _name(best.step)
        with NewFolder(self.best / name, self._facts(best.step)) as folder:
            if not folder.link(WEIGHTS, self.checkpoints / name, safetensors_chunks(best.weights)):
                folder.write(WEIGHTS, safetensors_chunks(best.weights))

    def _has(self, best: BestWeights) -> bool:
        return (self.best / _name(best.step)).exists()

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any], BestWeights | None] | None:
        """Load the newest intact checkpoint; returns its state and its best weights.

        A damaged one is reported and set aside, and the one before it is tried. Returns None for a
        run without checkpoints. Raises CheckpointError if all are damaged, or if one has another
        FORMAT.
        """
        found = self._parallel.on_main(lambda: self._read_newest(model))
        shared = self._parallel.broadcast(found and found.without_tensors())
        found = found or shared
        if found is None:
            return None
        load_weights(model, found.weights, found.path, self._parallel)
        load_optimizer(model, optimizer, found.moments, found.path, self._parallel)
        return found.state, found.best

    def _read_newest(self, model: nn.Module) -> "_Found | None":
        bad = [f"{path} was set aside before" for path in sorted(self.checkpoints.glob(".bad-*"))]
        newest_first = _newest_first(self.checkpoints)
        for path in sorted(set(self.checkpoints.glob("[!.]*")) - set(newest_first)):
            say(f"Note: {path} is no checkpoint; it is left alone")
        for path in newest_first:
            try:
                found = self._read(path, model)
            except _Unusable as error:
                aside = set_aside(path)
                say(f"Note: {error}; it is set aside as {aside.name}")
                bad.append(str(error))
                continue
            for best in _newest_first(self.best):
                if _step_of(best) > _step_of(path):  # a GPU repeats this step with other bits
                    remove_folder(best)
            if (step := found.state["best_step"]) is not None:
                # after the last evaluation of a finished run, which is made again, only its own
                # weights may be there
                places = [self.best / name for name in (_name(step), path.name)]
                if [place.exists() for place in places] != [False, True]:
                    found.best = self._read_best(step, model)
                    if found.best is not None and self.best_on_disk:
                        found.best = BestWeights(step, None)
            return found
        if bad:
            listed = "\n  ".join(bad)
            raise CheckpointError(
                f"no checkpoint in {self.checkpoints} can be used:\n  {listed}\n"
                "Another RUN_NAME, or none and RESUME = False, begins anew and leaves these alone."
            )
        return None

    def require_room(self, model: nn.Module, saves: int) -> None:
        """Raise ResourceError if the disk has no room for a new run's checkpoints, of which it
        saves at most `saves`."""
        keep = min(self._keep, saves)
        n_bytes = most_bytes(model, keep)
        what = f"keeping {keep:,} checkpoints and a new one"
        if keep > SPARE:
            what += f" (keep_checkpoints may be {SPARE})"

        def require() -> None:
            if self.newest() is None:
                require_space(self.checkpoints, n_bytes, what)

        self._parallel.on_main(require)

    def newest(self) -> Path | None:
        """The newest checkpoint's folder, unverified."""
        return next(iter(_newest_first(self.checkpoints)), None)

    def _facts(self, step: int) -> dict[str, Any]:
        return {"format": FORMAT, "run_id": self._run_id, "step": step}

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
            weights = _read_model(path, self._run_id, mapped=self.best_on_disk)
        except _Unusable as error:
            where = f", set aside as {set_aside(path).name}" if path.exists() else ""
            say(f"Note: the best weights are lost ({error}{where}); later ones take their place")
            return None
        _check_names(weights, weights_of(model), path)
        return BestWeights(step, weights)

    def _prune(self, best: BestWeights | None, keep: int) -> None:
        newest_first = _newest_first(self.checkpoints)
        for path in newest_first[keep:]:
            remove_folder(path)
        needed = {_best_step(path) for path in newest_first[:keep]} | {best and best.step}
        for path in _newest_first(self.best):
            if _step_of(path) not in needed:
                remove_folder(path)


@dataclass
class _Found:
    """What a checkpoint holds; only the main rank has its tensors."""

    path: Path
    state: dict[str, Any]
    weights: Tensors
    moments: Tensors
    best: BestWeights | None = None

    def without_tensors(self) -> "_Found":
        best = self.best
        if best is not None and best.weights is not None:
            best = replace(best, weights={})
        return replace(self, weights={}, moments={}, best=best)


class _Unusable(Exception):
    """A checkpoint or best weights that can't be read, or belong elsewhere."""


def read_weights(run_folder: Path, run_id: str, which: str = "best") -> tuple[int, Tensors]:
    """The step and the weights of a run's "best" or "last" saved weights; changes nothing.

    The run may be training in another process: if the files disappear during the read, it starts
    again with the newest ones. Falls back from damaged weights to earlier ones, with a notice, and
    from "best" to the checkpoints. An adapter is merged into the weights that the run began from.
    Raises CheckpointError if none can be read, SettingsError for another `which`.
    """
    path, tensors = _newest_sound(run_folder, which, lambda path: _read_model(path, run_id))
    if adapter := adapter_of(tensors):
        frozen = read_frozen(run_folder, run_id)
        try:
            tensors = merged(frozen, adapter)
        except (KeyError, RuntimeError):
            raise CheckpointError(f"{path} is no adapter of the weights in {run_folder}.") from None
    return _step_of(path), tensors


def read_adapter(run_folder: Path, run_id: str, which: str = "best") -> Tensors:
    """The adapter that read_weights() merges; raises as that does."""
    return _newest_sound(run_folder, which, lambda path: _read_model(path, run_id))[1]


def read_frozen(run_folder: Path, run_id: str) -> Tensors:
    """The weights that a run with LoRA began from, in fp32; the file may have them in the run's
    precision. CheckpointError if they can't be read."""
    try:
        tensors = _read_model(run_folder / FROZEN / _name(0), run_id)
        return {name: tensor.float() for name, tensor in tensors.items()}
    except _Unusable as error:
        raise CheckpointError(f"the run's frozen weights are lost: {error}.") from None


def newest_weights(run_folder: Path, run_id: str, which: str = "best") -> tuple[int, str]:
    """The step of the weights that read_weights() reads, and a sha256 that tells them from others.

    Raises as read_weights() does.
    """

    def verify(path: Path) -> str:
        _verify(path, run_id, WEIGHTS)
        with _unusable_where_unreadable(path):
            return hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()

    path, digest = _newest_sound(run_folder, which, verify)
    return _step_of(path), digest


def newest_step(run_folder: Path, which: str = "best") -> int | None:
    """The step of the weights that read_weights() tries first; None if none are saved."""
    places = [run_folder / "best"] * (which == "best") + [run_folder / "checkpoints"]
    return next((_step_of(path) for place in places for path in _newest_first(place)), None)


def _newest_sound(
    run_folder: Path, which: str, read: Callable[[Path], Result]
) -> tuple[Path, Result]:
    """The newest folder of weights that can be read, and what read() makes of it."""
    if which not in ("best", "last"):
        raise SettingsError(f'which is {shown(which)}; it must be "best" or "last"')
    # the best weights of a finished run may be newer than its last checkpoint
    places = [run_folder / "best"] * (which == "best") + [run_folder / "checkpoints"]
    bad: dict[Path, str] = {}
    while found := [path for place in places for path in _newest_first(place) if path not in bad]:
        path = found[0]
        try:
            return path, read(path)
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


def _verify(path: Path, run_id: str, *files: str) -> None:
    """Raise _Unusable if a file is damaged, or the manifest names another run or step.

    Raises CheckpointError for another FORMAT.
    """
    try:
        facts = verify_folder(path, files, others=False)
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
    """A checkpoint's state.json; ValueError if it is no such state."""
    if (path / STATE).stat().st_size > MOST_STATE_BYTES:
        raise ValueError(f"{STATE} is too long")
    state = json.loads((path / STATE).read_bytes())
    if not isinstance(state, dict) or not isinstance(state.get("best_step", ""), int | None):
        raise ValueError(f"{STATE} lacks what it should have")
    return state


def _read_model(path: Path, run_id: str, *, mapped: bool = False) -> Tensors:
    """The weights in a folder, verified; _Unusable if they can't be read.

    mapped: their memory is the file's.
    """
    _verify(path, run_id, WEIGHTS)
    with _unusable_where_unreadable(path):
        return (map_safetensors if mapped else read_safetensors)(path / WEIGHTS)


@dataclass
class SaveClock:
    """Tells when the next checkpoint is due: every `every` steps, or by time.

    By time it is due after `minutes`, but not before another save as slow as the last one fits
    into SAVING_SHARE of the run's time. After a failed one it is due as soon as failed() says.
    """

    every: int | None  # optimizer steps
    minutes: float

    def __post_init__(self) -> None:
        self._started_at = self._last_at = time.monotonic()
        self._spent_s = self._last_s = 0.0
        self._retry_s = 0.0  # 0: the last save did not fail
        self._retry_at = 0.0

    def is_due(self, step: int) -> bool:
        """Whether to save after this step."""
        if self._retry_s:
            return time.monotonic() >= self._retry_at
        if self.every is not None:
            return step % self.every == 0
        now = time.monotonic()
        share = (self._spent_s + self._last_s) / max(now - self._started_at, 1e-9)
        return now - self._last_at >= 60 * self.minutes and share <= SAVING_SHARE

    def note(self, began_at: float) -> None:
        """Note the end of a save that began at this time.monotonic()."""
        self._retry_s = 0.0
        self._last_at = time.monotonic()
        self._last_s = self._last_at - began_at
        self._spent_s += self._last_s

    def failed(self) -> float:
        """Note a save that the disk refused; returns the seconds to the next try."""
        self._retry_s = min(max(RETRY_S, 2 * self._retry_s), MOST_RETRY_S)
        self._retry_at = time.monotonic() + self._retry_s
        return self._retry_s


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _newest_first(folder: Path) -> list[Path]:
    """The step-NNNNNNNN in a folder, newest first; none if the folder doesn't exist."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=_step_of, reverse=True)


def has_checkpoint(run_folder: Path) -> bool:
    """Whether a run has saved a checkpoint, intact or not."""
    return bool(_newest_first(run_folder / "checkpoints"))


def _best_step(path: Path) -> int | None:
    """The step of a checkpoint's best weights."""
    try:
        return json.loads((path / STATE).read_bytes())["best_step"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: restore() reports it
        return None


def most_saves(total_steps: int, save_every: int | None) -> int:
    """The most checkpoints that a run saves; by time, one after each step."""
    return -(-total_steps // (save_every or 1))


def most_bytes(model: nn.Module, keep: int) -> int:
    """The most bytes of a run's checkpoints: those that it keeps, and one that is being written,
    each with weights, two moments and perhaps best weights of its own."""
    return 4 * sum(value.nbytes for value in weights_of(model).values()) * (keep + 1)


def weights_of(model: nn.Module) -> Tensors:
    """What a checkpoint holds of a model: its parameters by name, a shared one once; where it has
    LoRA, those of the adapter alone."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return adapter_of(parameters) or parameters


def copy_weights(model: nn.Module, parallel: Parallel = ALONE) -> Tensors:
    """A copy of the parameters in CPU memory; a collective: the main rank gets the copy."""
    own = weights_of(model)
    return {
        name: value.to("cpu", copy=value is own[name])
        for name, value in gathered(own, parallel).items()
    }


def load_weights(
    model: nn.Module, weights: Tensors, place: object, parallel: Parallel = ALONE
) -> None:
    """Set every parameter to the main rank's weights; a collective.

    Raises CheckpointError, naming place, if names or shapes don't match, or one is not fp32.
    """
    current = weights_of(model)
    parallel.on_main(lambda: _check_names(weights, current, place))
    with torch.no_grad():
        for name, value in current.items():
            value.copy_(placed(weights.get(name), value, parallel))


def assign_weights(model: nn.Module, weights: Tensors, place: object) -> None:
    """Give a model on the "meta" device these parameters, without a copy.

    Raises CheckpointError, naming place, if names or shapes don't match, or one is not fp32.
    """
    _check_names(weights, weights_of(model), place)
    model.load_state_dict(weights, strict=False, assign=True)  # weights name a shared one once
    model.tie_head()


def _check_names(found: Tensors, expected: Tensors, place: object) -> None:
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


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state by "kind.parameter", say "exp_avg.head.weight"."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{kind}.{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Tensors,
    place: object,
    parallel: Parallel = ALONE,
) -> None:
    """Set the optimizer's state, but not its settings, to the main rank's tensors; a collective.

    Raises CheckpointError, naming place, for state of unknown parameters or of another shape, and
    if only some of the parameters have state.
    """
    order = [p for group in optimizer.param_groups for p in group["params"]]
    index = {parameter: i for i, parameter in enumerate(order)}
    parameters = {name: p for name, p in model.named_parameters() if p in index}

    def require_fit() -> None:
        kinds: dict[int, set[str]] = {i: set() for i in range(len(order))}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            parameter = parameters.get(name)
            # torch reads past the end of a moment that is too small
            if parameter is None or value.shape != (() if kind == "step" else parameter.shape):
                raise CheckpointError(
                    f"{place} does not fit the model: {key[:80]} has no place in it."
                )
            kinds[index[parameter]].add(kind)
        # Muon and AdamW have no kind in common: two parameters share all kinds or none
        of_any = {frozenset(found) for found in kinds.values()}
        if tensors and (frozenset() in of_any or any(a & b for a, b in combinations(of_any, 2))):
            raise CheckpointError(f"{place} does not fit the model: it lacks state of a parameter.")

    parallel.on_main(require_fit)
    state: dict[int, Tensors] = {}
    scalar = torch.zeros(())
    for key in parallel.broadcast(list(tensors)):
        kind, _, name = key.partition(".")
        parameter = parameters[name]
        like = scalar if kind == "step" else parameter.detach()
        state.setdefault(index[parameter], {})[kind] = placed(tensors.get(key), like, parallel)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def safetensors_chunks(
    tensors: Tensors, metadata: dict[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """A safetensors file in chunks: its header, then each tensor, without a copy of CPU tensors.

    The library's own writer copies all tensors at once. Format: github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    # the widest dtypes first, as the library does, so that each tensor is aligned
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


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, in CPU memory.

    Raises SafetensorError for another format, OSError if the file can't be read.
    """
    return {name: tensor.clone() for name, tensor in map_safetensors(path).items()}


def map_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file, whose memory is the file's: read where they are used.

    Raises as read_safetensors() does.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except AttributeError as error:  # the library looks up the dtype in torch by name
        raise SafetensorError(f"not fp32, and this torch has no {error.name}") from error
    except RuntimeError:
        if path.exists():
            raise
        # the library opens the file twice, and it was removed in between
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
