"""The ranks that torchrun starts: collectives, turns, and failures of ranks.

A process without torchrun is rank 0 of 1: it makes no process group, and collectives cost nothing.
"""

import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from engine import errors
from engine.console import complain, silence
from engine.errors import LostRankError, PipelineError, ResourceError, SettingsError, first_line

KINDS = ("auto", "ddp", "fsdp")
TIMEOUT_S = 180  # how long ranks wait for one another, unless GPT_RANK_TIMEOUT_S is set
BEAT_S = 0.5  # between the heartbeats of a rank that others wait for
ROLL_CALL_S = 2.0  # how long live ranks may take to answer after a failure
LEAVING_S = 10.0  # after which a process that hangs while it exits is ended
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun's
# in the message of a RuntimeError when communication with another rank fails
SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")
GONE = ("", "Z", "X")  # states of a process that has ended
PR_SET_PDEATHSIG = 1  # of prctl() in Linux's sys/prctl.h
T = TypeVar("T")


@dataclass(eq=False)
class Parallel:
    """This process among the ranks of a run.

    All ranks must call a method that says "Collective.", in the same order. If a rank does not
    answer, it raises RuntimeError; watched() turns that into a LostRankError that names the rank.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    _: KW_ONLY
    timeout_s: float = TIMEOUT_S
    store: Any = None  # key-value store of these processes
    job: Any = None  # the same, shared with processes that torchrun starts after a failure
    group: Any = None  # process group for CPU tensors and objects; None: the default group
    place: str = ""  # what this rank is doing, for messages: "step 12"

    def __post_init__(self) -> None:
        self.kind = "none" if self.world == 1 else "ddp"  # or "fsdp"
        self._turns = 0
        self._has_left = False

    @property
    def is_main(self) -> bool:
        """Whether this rank reads and writes the run folder."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.world == 1

    def choose_kind(self, requested: str) -> None:
        """Replicate ("ddp", which "auto" means) or shard ("fsdp") the model, as PARALLEL says."""
        if not self.is_alone:
            self.kind = "ddp" if requested == "auto" else requested

    def only_main(self, value: T) -> T | None:
        """The value on the main rank, None on others."""
        return value if self.is_main else None

    def share_of(self, items: list[T]) -> list[T]:
        """This rank's items of a list that all ranks have: every world-th one."""
        return items[self.rank :: self.world]

    def seed_apart(self, *numbers: int) -> None:
        """Give each rank a random seed of its own; the main rank keeps its generator's state."""
        if not self.is_main:
            digest = hashlib.sha256(repr((*numbers, self.rank)).encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:6], "big"))

    def highest(self, *numbers: float) -> list[float]:
        """The elementwise maximum of the ranks' numbers. Collective."""
        if self.is_alone:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: no GPU sync
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self.group)
        return values.tolist()

    def lowest(self, number: int) -> int:
        """The minimum of the ranks' numbers. Collective."""
        return -int(self.highest(-number)[0])

    def mean(self, number: float) -> float:
        """The mean of the ranks' numbers. Collective."""
        return self.sum(torch.tensor(number, dtype=torch.float64)).item() / self.world

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce a tensor to the sum of the ranks' tensors, in place. Collective."""
        if not self.is_alone:
            torch.distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """The main rank's value, which pickle must be able to send. Collective."""
        if self.is_alone:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def from_main(self, job: Callable[[], T]) -> T:
        """on_main(), but with its result on every rank. Collective."""
        return cast(T, self.broadcast(self.on_main(job)))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks. Collective."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def require_same(self, **values: str) -> None:
        """Raise SettingsError on every rank unless all ranks have these values. Collective."""
        known = self.gather((socket.gethostname(), values))
        for rank, (host, found) in enumerate(known):
            odd = [name for name in values if found[name] != known[0][1][name]]
            if odd:
                raise SettingsError(
                    f"rank {rank} (on {host}) has not the same {', '.join(odd)} as rank 0 (on "
                    f"{known[0][0]}).\nStart every machine with the same settings and texts."
                )

    def on_main(self, job: Callable[[], T]) -> T | None:
        """Run a job on the main rank; its result there, None elsewhere. Collective.

        The others wait as long as it takes; its PipelineError is raised on every rank.
        """
        if self.is_main:
            return self._lead(job)
        self._follow(0)
        return None

    def local_first(self, job: Callable[[], T]) -> T:
        """Run a job on each machine's first rank, then on its others. Collective."""
        if self.local_rank == 0:
            return self._lead(job)
        self._follow(self.rank - self.local_rank)
        return job()

    def _lead(self, job: Callable[[], T]) -> T:
        """Run a job for which other ranks wait in _follow()."""
        if self.is_alone:
            return job()
        self._turns += 1
        outcome: dict[str, str] | None = None  # None: watched() reports the failure
        try:
            with self._heartbeat():
                result = job()
            outcome = {}
            return result
        except PipelineError as error:
            # the error's own class may be another room's
            kind = next(c for c in type(error).__mro__ if c.__module__ == errors.__name__)
            outcome = {"kind": kind.__name__, "message": str(error)}
            raise
        finally:
            if outcome is not None:
                with contextlib.suppress(RuntimeError):  # the job is done in any case
                    self.store.set(f"turn/{self._turns}/{self.rank}", json.dumps(outcome))

    @contextlib.contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """Count up in the store every BEAT_S, which shows the others that this process lives."""
        is_over = threading.Event()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone
                while not is_over.wait(BEAT_S):
                    self.store.add(f"beat/{self.rank}", 1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _follow(self, leader: int) -> None:
        """Wait until a rank's _lead() is done, for as long as its heartbeat goes on."""
        self._turns += 1
        done = f"turn/{self._turns}/{leader}"
        pause, last, last_at = 0.005, -1, time.monotonic()
        while True:
            has_failed = self.store.check([f"failed/{leader}"])  # first: it may be done and fail
            if self.store.check([done]):
                break
            count, now = self.store.add(f"beat/{leader}", 0), time.monotonic()
            if count != last:
                last, last_at = count, now
            silent_s = now - last_at
            is_gone = silent_s > 4 * BEAT_S and self._process_of(leader)[1] in GONE
            if has_failed or is_gone or silent_s > self.timeout_s:
                raise RuntimeError(f"Timed out: rank {leader} gives no sign of life")
            time.sleep(pause)
            pause = min(2 * pause, BEAT_S)
        outcome = json.loads(self.store.get(done))
        if outcome:
            raise getattr(errors, outcome["kind"])(outcome["message"])

    @contextlib.contextmanager
    def held_by_main(self, context: Callable[[], contextlib.AbstractContextManager]) -> Iterator:
        """Enter a context on the main rank only; its PipelineError is raised on every rank."""
        with contextlib.ExitStack() as stack:
            self.on_main(lambda: stack.enter_context(context()))
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Report a failure to the other ranks; turn a failed collective into a LostRankError."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit, errors.RunFinished):
            raise
        except Exception as error:
            if self.is_alone or isinstance(error, LostRankError):
                raise
            if is_communication_error(error):
                _ignore_sigterm()
                raise LostRankError(self._find_lost_ranks()) from error
            with contextlib.suppress(RuntimeError):  # the store is gone
                report = f"{type(error).__name__}: {first_line(error)}"
                self.store.set(f"failed/{self.rank}", report[:300])
            if not isinstance(error, PipelineError) and not hasattr(error, "__notes__"):
                error.add_note(f"(on {self.label})")
            raise

    @property
    def label(self) -> str:
        """This rank and its place, for messages: "rank 1, step 12"."""
        return f"rank {self.rank}, {self.place}" if self.place else f"rank {self.rank}"

    @property
    def prefix(self) -> str:
        """What this rank's failure message begins with; "" for a process without others."""
        return "" if self.is_alone else f"{self.label}: "

    def speaks_for_all(self, message: str) -> bool:
        """Whether this rank is the first with this failure message: it alone prints."""
        if self.is_alone:
            return True
        _ignore_sigterm()
        key = hashlib.sha256(message.encode("utf-8", "replace")).hexdigest()
        try:
            if not self.is_main:
                time.sleep(0.5)  # so that the main rank is first where it fails too
            is_first = self.store.add(f"told/{key}", 1) == 1
        except RuntimeError:  # the store is gone
            is_first = True
        silence(not is_first)
        return is_first

    def _find_lost_ranks(self) -> str:
        """The message that names the ranks that don't answer; kills those that hang on this
        machine, for which torchrun would wait half a minute."""
        at = f" at {self.place}" if self.place else ""
        try:
            self.store.set(f"here/{self.rank}", "")
            missing = [rank for rank in range(self.world) if rank != self.rank]
            until = time.monotonic() + ROLL_CALL_S
            while missing and time.monotonic() < until:
                time.sleep(0.05)
                failed = [rank for rank in missing if self.store.check([f"failed/{rank}"])]
                if failed:
                    reason = self.store.get(f"failed/{failed[0]}").decode("utf-8", "replace")
                    return f"rank {failed[0]} has failed{at}: {reason}\n{RESTART}"
                missing = [rank for rank in missing if not self.store.check([f"here/{rank}"])]
            for rank in missing:
                pid, state = self._process_of(rank)
                if state not in ("?", *GONE):
                    with contextlib.suppress(ProcessLookupError):  # by now it has ended
                        os.kill(pid, signal.SIGKILL)
        except RuntimeError:
            return f"the process at which the ranks meet is gone{at}.\n{RESTART}"
        if not missing:
            return f"a message between ranks did not get through{at}, but all live.\n{RESTART}"
        listed = ", ".join(str(rank) for rank in missing)
        name, verb = ("rank", "does") if len(missing) == 1 else ("ranks", "do")
        return f"{name} {listed} {verb} not answer{at}: ended from outside, or hanging.\n{RESTART}"

    def _process_of(self, rank: int) -> tuple[int, str]:
        """A rank's process and its state by proc(5): "" if it is gone, "?" if unknown or remote."""
        process = json.loads(self.store.get(f"process/{rank}"))
        pid = process["pid"]
        if process["pids"] != _pid_namespace() or not process["pids"]:
            return pid, "?"
        try:
            stat = Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace")
        except OSError:
            return pid, ""
        state, parent = stat.rpartition(")")[2].split()[:2]
        # another parent than torchrun: the number was given to another process
        return pid, state if int(parent) == os.getppid() else ""

    def note(self, name: str, value: str) -> None:
        """Keep a value for the processes that torchrun starts after a failure of these."""
        if self.job is not None:
            self.job.set(name, value)

    def noted(self, name: str) -> str | None:
        """What note() has kept under this name, in an earlier process of the job too."""
        if self.job is None or not self.job.check([name]):
            return None
        return self.job.get(name).decode()

    def leave(self) -> None:
        """Leave the process group. Safe to call again."""
        if self.is_alone or self._has_left:
            return
        self._has_left = True
        # NCCL may wait for ever for a rank that is gone
        guard = threading.Timer(LEAVING_S, os._exit, (ResourceError.exit_code,))
        guard.daemon = True
        with contextlib.suppress(RuntimeError):  # an exiting interpreter starts no threads
            guard.start()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        guard.cancel()


RESTART = "Start the job again: it goes on from the last checkpoint (torchrun --max-restarts does)."
ALONE = Parallel()
_joined: Parallel | None = None


def join() -> Parallel:
    """Join the ranks that torchrun started, once, and silence all but rank 0; ALONE without any.

    Raises SettingsError for incomplete variables, ResourceError if a rank can't be reached.
    """
    global _joined
    if _joined is not None:
        return _joined
    found = {name: os.environ.get(name) for name in ENVIRONMENT}
    is_one_of_several = found["LOCAL_RANK"] or (found["RANK"] and found["WORLD_SIZE"])
    if not is_one_of_several or found["WORLD_SIZE"] == "1":
        return ALONE
    if missing := [name for name, value in found.items() if not value]:
        there = ", ".join(name for name, value in found.items() if value)
        raise SettingsError(
            f"{there} is set in the environment, but not {', '.join(missing)}.\n"
            "Start several processes by torchrun, which sets them all; for one, unset them."
        )
    rank, world = _whole_number("RANK", 0), _whole_number("WORLD_SIZE", 1)
    local_rank, local_world = _whole_number("LOCAL_RANK", 0), _whole_number("LOCAL_WORLD_SIZE", 1)
    timeout_s = max(1, _whole_number("GPT_RANK_TIMEOUT_S", TIMEOUT_S))
    silence(local_rank > 0)
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        # SIGTERM if torchrun itself is killed: this process then saves and ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    store, job, group = _meet(rank, world, timeout_s)
    silence(rank > 0)
    _joined = Parallel(
        rank, world, local_rank, local_world, timeout_s=timeout_s, store=store, job=job, group=group
    )
    atexit.register(_joined.leave)
    return _joined


def _whole_number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise SettingsError(f"{name} is {text!r} in the environment; it must be a whole number")
    return int(text)


def _meet(rank: int, world: int, timeout_s: float) -> tuple[Any, Any, Any]:
    """Join the process group; returns the ranks' store, the job's, and the group for the CPU."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    failed = f"rank {rank} can't meet the other {world - 1} at {address}:"
    advice = (
        "That is where torchrun's --rdzv-endpoint, or MASTER_ADDR and MASTER_PORT, point: the "
        "first machine, on a free port that the others can reach."
    )
    timeout, group = timedelta(seconds=timeout_s), None

    def give_up() -> None:
        complain(f"ResourceError: {failed} no answer\n{advice}")
        os._exit(ResourceError.exit_code)

    # torch's timeout does not end a connection to a program that never answers
    guard = threading.Timer(timeout_s + min(LEAVING_S, timeout_s), give_up)
    guard.daemon = True
    guard.start()
    try:
        server, _, _ = next(torch.distributed.rendezvous("env://", rank, world, timeout=timeout))
        server.set_timeout(timeout)
        # keys of an earlier start of the same job don't count
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.PrefixStore(f"gpt-trainer/{attempt}", server)
        me = {"pids": _pid_namespace(), "pid": os.getpid()}
        store.set(f"process/{rank}", json.dumps(me))
        named = {"store": store, "rank": rank, "world_size": world}
        # Windows has no NCCL
        if torch.cuda.is_available() and torch.distributed.is_nccl_available():
            # NCCL ends a process whose collective times out: gloo's timeout must report first
            longer = timeout + timedelta(seconds=3 * LEAVING_S)
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=longer, **named)
            group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        else:
            torch.distributed.init_process_group("gloo", timeout=timeout, **named)
        # the first collective makes the connections: better now than during training
        torch.distributed.all_reduce(torch.zeros(1), group=group)
    except (RuntimeError, ValueError, OSError) as error:
        raise ResourceError(f"{failed} {first_line(error)[:200]}\n{advice}") from error
    finally:
        guard.cancel()
    return store, torch.distributed.PrefixStore("gpt-trainer/job", server), group


def is_communication_error(error: BaseException | None) -> bool:
    """Whether an error is a collective's that another rank has not joined."""
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def _ignore_sigterm() -> None:
    """Outlive torchrun's SIGTERM to the remaining ranks until the failure is reported."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def joined() -> Parallel:
    """What join() returned in this process; ALONE before it is called."""
    return _joined or ALONE


def _pid_namespace() -> str:
    """Where this process's number is valid: boot and pid namespace; "" where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
