"""Several processes as one trainer: who this one is, what all agree on, and who is missing.

torchrun starts the processes and tells each its rank; torch.distributed carries what they tell
each other. A process that was started alone is rank 0 of 1: the same calls then cost nothing, and
no process group is made. How a model lies over the ranks is distributed/sharding.py's.
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
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine import errors
from engine.console import complain, silence
from engine.errors import LostRankError, PipelineError, ResourceError, SettingsError, first_line

KINDS = ("auto", "ddp", "fsdp")
TIMEOUT_S = 180  # seconds; how long ranks wait for one another; GPT_RANK_TIMEOUT_S says otherwise
BEAT_S = 0.5  # how often a rank that others wait for shows that it lives
ROLL_CALL_S = 2.0  # how long after a failure the ranks that live may take to say so
LEAVING_S = 10.0  # a process that should end, and has not by then, is ended
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torchrun's
# in what a RuntimeError says when a message to or from another rank did not get through
SIGNS = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")
GONE = ("", "Z", "X")  # states of a process that has ended
PR_SET_PDEATHSIG = 1  # of prctl() in Linux's sys/prctl.h
T = TypeVar("T")


class Parallel:
    """This process among the ranks of a run.

    Every method that all ranks have to call, in the same order, says "together". Where a rank
    does not answer they raise RuntimeError, which watched() turns into a LostRankError that names
    it.
    """

    def __init__(
        self,
        rank: int = 0,
        world: int = 1,
        local_rank: int = 0,
        local_world: int = 1,
        *,
        timeout_s: float = TIMEOUT_S,
        store: Any = None,
        job: Any = None,
        group: Any = None,
    ) -> None:
        self.rank, self.world = rank, world
        self.local_rank, self.local_world = local_rank, local_world
        self.kind = "none" if world == 1 else "ddp"  # or "fsdp"
        self.place = ""  # what this rank is at, for messages: "step 12"
        self._timeout_s = timeout_s
        self._store = store  # of these processes; job is also for those that take their place
        self._job = job
        self._group = group  # what numbers and objects travel by; None: all by the same
        self._turns = 0
        self._has_left = False

    @property
    def is_main(self) -> bool:
        """Whether this rank is the one that reads and writes the run's folder."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.world == 1

    def choose_kind(self, requested: str) -> None:
        """Take PARALLEL's value for how a model lies over several ranks; "auto" is ddp."""
        if not self.is_alone:
            self.kind = "ddp" if requested == "auto" else requested

    def only_main(self, value: T) -> T | None:
        """The value on the main rank, None on others."""
        return value if self.is_main else None

    def share_of(self, items: list[T]) -> list[T]:
        """This rank's part of a list that all ranks have: every world-th one."""
        return items[self.rank :: self.world]

    def seed_apart(self, *numbers: int) -> None:
        """Let torch draw other numbers here than on other ranks; the main one's stay the same."""
        if not self.is_main:
            digest = hashlib.sha256(repr((*numbers, self.rank)).encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:6], "big"))

    # ------------------------------------------------------------------------- agreeing

    def highest(self, *numbers: float) -> list[float]:
        """The highest of the ranks' numbers, each for itself; together."""
        if self.is_alone:
            return list(numbers)
        from torch import distributed

        values = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: nobody waits for a GPU
        distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self._group)
        return values.tolist()

    def lowest(self, number: int) -> int:
        """The lowest of the ranks' numbers; together."""
        return -int(self.highest(-number)[0])

    def mean(self, number: float) -> float:
        """The mean of the ranks' numbers; together."""
        return self.sum(torch.tensor(number, dtype=torch.float64)).item() / self.world

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by the sum of the ranks' tensors, on its device; together."""
        if not self.is_alone:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """The main rank's value, of any kind that pickles, on every rank; together."""
        if self.is_alone:
            return value
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank; together."""
        if self.is_alone:
            return [value]
        from torch import distributed

        values = [None] * self.world
        distributed.all_gather_object(values, value, group=self._group)
        return values

    def require_same(self, **values: str) -> None:
        """Raise SettingsError on every rank where one has another value than the main one.

        values are named by what they are of; together.
        """
        known = self.gather((socket.gethostname(), values))
        for rank, (host, found) in enumerate(known):
            odd = [name for name in values if found[name] != known[0][1][name]]
            if odd:
                raise SettingsError(
                    f"rank {rank} (on {host}) has not the same {', '.join(odd)} as rank 0 (on "
                    f"{known[0][0]}).\nStart every machine with the same settings and texts."
                )

    # ------------------------------------------------------------------- taking turns

    def on_main(self, job: Callable[[], T]) -> T | None:
        """Run a job on the main rank while the others wait; its result there, None elsewhere.

        What it raises as a PipelineError is raised on every rank. Together.
        """
        return self._led(0, job)

    def local_first(self, job: Callable[[], T]) -> T:
        """Run a job on each machine's first rank, then on its others; the result here. Together."""
        result = self._led(self.rank - self.local_rank, job)
        return result if self.local_rank == 0 else job()

    def _led(self, leader: int, job: Callable[[], T]) -> T | None:
        if self.is_alone:
            return job()
        self._turns += 1
        done, beat = f"turn/{self._turns}/{leader}", f"beat/{leader}"
        if self.rank != leader:
            self._wait_for(leader, done, beat)
            return None
        said = {}
        try:
            with self._beating(beat):
                return job()
        except PipelineError as error:
            # a room may have a kind of its own of one of these
            kind = next(c for c in type(error).__mro__ if c.__module__ == errors.__name__)
            said = {"kind": kind.__name__, "message": str(error)}
            raise
        except BaseException:
            said = None  # nobody is told to go on, and the failure itself is told by watched()
            raise
        finally:
            if said is not None:
                with contextlib.suppress(RuntimeError):  # what the job did stands all the same
                    self._store.set(done, json.dumps(said))

    @contextlib.contextmanager
    def _beating(self, beat: str) -> Iterator[None]:
        """Show the others twice a second that this process lives, whatever it is at."""
        is_over = threading.Event()

        def show() -> None:
            with contextlib.suppress(RuntimeError):  # there is nobody left to be shown it
                while not is_over.wait(BEAT_S):
                    self._store.add(beat, 1)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _wait_for(self, leader: int, done: str, beat: str) -> None:
        """Wait for a rank's turn to be over; for as long as it shows that it lives."""
        pause, last, last_at = 0.005, -1, time.monotonic()
        while True:
            has_failed = self._store.check([f"failed/{leader}"])  # first: it may be done and fail
            if self._store.check([done]):
                break
            count, now = self._store.add(beat, 0), time.monotonic()
            if count != last:
                last, last_at = count, now
            silent_s = now - last_at
            is_gone = silent_s > 4 * BEAT_S and _state_of(self._process_of(leader)) in GONE
            if has_failed or is_gone or silent_s > self._timeout_s:
                raise RuntimeError(f"Timed out: rank {leader} gives no sign of life")
            time.sleep(pause)
            pause = min(2 * pause, BEAT_S)
        said = json.loads(self._store.get(done))
        if said:
            raise getattr(errors, said["kind"])(said["message"])

    @contextlib.contextmanager
    def held_by_main(self, context: Callable[[], contextlib.AbstractContextManager]) -> Iterator:
        """Enter a context on the main rank alone; what prevents that is raised on every rank."""
        with contextlib.ExitStack() as stack:
            self.on_main(lambda: stack.enter_context(context()))
            yield

    # ------------------------------------------------------------------------- failing

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Let the other ranks know of a failure here, and name the rank that fails to answer.

        A message that did not get through becomes a LostRankError.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, errors.RunFinished):
            raise
        except Exception as error:
            if self.is_alone or isinstance(error, LostRankError):
                raise
            if _is_about_messages(error):
                _ignore_sigterm()
                raise LostRankError(self._call_the_roll()) from error
            with contextlib.suppress(RuntimeError):  # then there is nobody to tell it to
                said = f"{type(error).__name__}: {first_line(error)}"
                self._store.set(f"failed/{self.rank}", said[:300])
            if not isinstance(error, PipelineError) and not hasattr(error, "__notes__"):
                error.add_note(f"(on {self.label})")
            raise

    @property
    def label(self) -> str:
        """What messages call this rank and its place: "rank 1, step 12"."""
        return f"rank {self.rank}, {self.place}" if self.place else f"rank {self.rank}"

    @property
    def prefix(self) -> str:
        """What this rank's message of failure begins with; nothing for a process alone."""
        return "" if self.is_alone else f"{self.label}: "

    def speaks_for_all(self, message: str) -> bool:
        """Whether this rank is the one to tell a failure: the first of those that have the same.

        If so, its output is not silenced any more.
        """
        if self.is_alone:
            return True
        _ignore_sigterm()
        key = hashlib.sha256(message.encode("utf-8", "replace")).hexdigest()
        try:
            if not self.is_main:
                time.sleep(0.5)  # the main one's word is preferred
            is_first = self._store.add(f"told/{key}", 1) == 1
        except RuntimeError:  # there is no asking any more
            is_first = True
        silence(not is_first)
        return is_first

    def _call_the_roll(self) -> str:
        """Who is missing after a message did not get through, and why, as far as it is known.

        Those that live say so; one that doesn't, and hangs on this machine, is ended: torchrun
        would wait half a minute for it.
        """
        at = f" at {self.place}" if self.place else ""
        try:
            self._store.set(f"here/{self.rank}", "")
            missing = [rank for rank in range(self.world) if rank != self.rank]
            until = time.monotonic() + ROLL_CALL_S
            while missing and time.monotonic() < until:
                time.sleep(0.05)
                told = [rank for rank in missing if self._store.check([f"failed/{rank}"])]
                if told:
                    reason = self._store.get(f"failed/{told[0]}").decode("utf-8", "replace")
                    return f"rank {told[0]} has failed{at}: {reason}\n{RESTART}"
                missing = [rank for rank in missing if not self._store.check([f"here/{rank}"])]
            for rank in missing:
                _end_if_it_hangs(self._process_of(rank))
        except RuntimeError:
            return f"the process at which the ranks meet is gone{at}.\n{RESTART}"
        if not missing:
            return f"a message between ranks did not get through{at}, but all live.\n{RESTART}"
        listed = ", ".join(str(rank) for rank in missing)
        name, verb = ("rank", "does") if len(missing) == 1 else ("ranks", "do")
        return f"{name} {listed} {verb} not answer{at}: ended from outside, or hanging.\n{RESTART}"

    def _process_of(self, rank: int) -> dict[str, Any]:
        return json.loads(self._store.get(f"process/{rank}"))

    def note(self, name: str, value: str) -> None:
        """Keep a word for the processes that torchrun starts in place of these after a failure."""
        if self._job is not None:
            self._job.set(name, value)

    def noted(self, name: str) -> str | None:
        """What note() has kept of this job, by an earlier process too."""
        if self._job is None or not self._job.check([name]):
            return None
        return self._job.get(name).decode()

    def leave(self) -> None:
        """Leave the group; once is enough, and more do no harm."""
        if self.is_alone or self._has_left:
            return
        self._has_left = True
        from torch import distributed

        # a GPU's library may wait for ever for a rank that is gone
        guard = threading.Timer(LEAVING_S, os._exit, (ResourceError.exit_code,))
        guard.daemon = True
        with contextlib.suppress(RuntimeError):  # an interpreter that ends may start none
            guard.start()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        guard.cancel()


RESTART = "Start the job again: it goes on from the last checkpoint (torchrun --max-restarts does)."
ALONE = Parallel()
_joined: Parallel | None = None


def join() -> Parallel:
    """This process's place among the ranks that torchrun started; ALONE where it started none.

    The first call joins the group, and later ones give the same. Other ranks than the first print
    nothing from then on. Raises SettingsError where torchrun's variables are incomplete,
    ResourceError where the others can't be met.
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
    _end_with_torchrun()
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
    """Join the process group; returns the ranks' store, that of their job, and the group for what
    is not on GPUs."""
    from torch import distributed

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

    # of a program that takes a connection there and says nothing, torch doesn't tire
    guard = threading.Timer(timeout_s + min(LEAVING_S, timeout_s), give_up)
    guard.daemon = True
    guard.start()
    try:
        server, _, _ = next(distributed.rendezvous("env://", rank, world, timeout=timeout))
        server.set_timeout(timeout)
        # what an earlier start of the same job left there is not this one's
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"gpt-trainer/{attempt}", server)
        me = {"pids": _pid_namespace(), "pid": os.getpid()}
        store.set(f"process/{rank}", json.dumps(me))
        named = {"store": store, "rank": rank, "world_size": world}
        if torch.cuda.is_available() and distributed.is_nccl_available():  # Windows has no NCCL
            # NCCL ends a process whose message takes too long: the others are to tell why before
            longer = timeout + timedelta(seconds=3 * LEAVING_S)
            distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=longer, **named)
            group = distributed.new_group(backend="gloo", timeout=timeout)
        else:
            distributed.init_process_group("gloo", timeout=timeout, **named)
        # the first message makes the connections: better now than in the middle of training
        distributed.all_reduce(torch.zeros(1), group=group)
    except (RuntimeError, ValueError, OSError) as error:
        raise ResourceError(f"{failed} {first_line(error)[:200]}\n{advice}") from error
    finally:
        guard.cancel()
    return store, distributed.PrefixStore("gpt-trainer/job", server), group


def _is_about_messages(error: Exception) -> bool:
    """Whether an error says that a message to or from another rank did not get through."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)
    )


def _ignore_sigterm() -> None:
    """torchrun ends the ranks that are left at once, and these have something to say before."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def joined() -> Parallel:
    """This process's place among the ranks that it has joined; ALONE where it has joined none."""
    return _joined or ALONE


def _end_with_torchrun() -> None:
    """Let this process get SIGTERM where torchrun itself is killed: it saves, and is no orphan."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _pid_namespace() -> str:
    """What two processes have in common that know each other's numbers; "" where nothing tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state_of(process: dict[str, Any]) -> str:
    """The state of a rank's process as Linux tells it: a letter of proc(5), "" where it is gone,
    "?" where it is on another machine or nothing tells."""
    if process["pids"] != _pid_namespace() or not process["pids"]:
        return "?"
    try:
        stat = Path(f"/proc/{process['pid']}/stat").read_text("ascii", errors="replace")
    except OSError:
        return ""
    state, parent = stat.rpartition(")")[2].split()[:2]
    # one of torchrun's, as this one is; else the number has been given to another
    return state if int(parent) == os.getppid() else ""


def _end_if_it_hangs(process: dict[str, Any]) -> None:
    """Kill a rank of this machine that does not answer."""
    if _state_of(process) not in ("?", *GONE):
        with contextlib.suppress(ProcessLookupError):  # by now it has ended
            os.kill(process["pid"], signal.SIGKILL)
