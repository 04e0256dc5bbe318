"""Stop signals, really sent: what they become, and what they leave alone."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest
import torch

from data import make_loaders, plan_windows
from distributed.parallel import ALONE, Parallel
from distributed.signals import StopSignals, defer_to_owner
from engine.errors import Stopped

HANDLED = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def handlers() -> list:
    return [signal.getsignal(number) for number in HANDLED]


@pytest.fixture(autouse=True)
def same_handlers_afterwards():
    before = handlers()
    yield
    for number, handler in zip(HANDLED, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_becomes_a_wish_that_check_grants(number, capsys):
    with StopSignals() as stop:
        stop.check()
        send(number)
        with pytest.raises(Stopped) as caught:
            stop.check()
    assert caught.value.exit_code == 128 + number
    printed = capsys.readouterr()
    assert "Stopping after this step" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_an_echo_of_ctrl_c_is_one_wish_and_a_second_one_stops_at_once(first, capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StopSignals() as stop:
        send(first)
        now += 0.45
        for _ in range(3):
            send(signal.SIGINT)  # the terminal's and the launcher's
        now += 0.1
        send(signal.SIGTERM)  # a wish already; only Ctrl-C is a person in a hurry
        with pytest.raises(Stopped) as granted:
            stop.check()
        assert granted.value.signal_number == first
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert capsys.readouterr().err.count("Stopping") == 1


def test_handlers_are_put_back_after_an_error_too():
    before = handlers()
    for error in (None, ValueError):
        with contextlib.suppress(ValueError), StopSignals():
            assert all(now != earlier for now, earlier in zip(handlers(), before, strict=True))
            if error is not None:
                raise error
        assert handlers() == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does: it stays ignored
    with StopSignals() as stop:
        send(signal.SIGHUP)
        stop.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_failed_collective_leaves_sigterm_ignored_until_the_lost_rank_is_reported():
    before = handlers()
    lost = torch.distributed.DistError("Connection closed by peer")
    for error, parallel in ((ValueError(), Parallel(0, 2)), (lost, ALONE), (None, Parallel(0, 2))):
        with contextlib.suppress(ValueError, RuntimeError), StopSignals(parallel):
            if error is not None:
                raise error
        assert handlers() == before
    with contextlib.suppress(RuntimeError), StopSignals(Parallel(0, 2)):
        raise lost
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    signal.signal(signal.SIGTERM, before[HANDLED.index(signal.SIGTERM)])
    assert handlers() == before


def test_outside_of_the_main_thread_nothing_is_caught():
    before, seen = handlers(), []

    def work() -> None:
        with StopSignals() as stop:
            seen.append(handlers())
            stop.check()
            stop.check_within_step(time.perf_counter() - 1000, 0.1)
        seen.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, "done"]
    assert handlers() == before


def test_only_a_step_with_long_to_go_is_left(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0)
    with StopSignals() as stop:
        stop.check_within_step(100.0 - 10.0, 0.5)  # nobody has asked
        send(signal.SIGTERM)
        for elapsed_s, done in ((10.0, 0.5), (1.0, 0.1)):  # 10 s and 9 s to go
            with pytest.raises(Stopped):
                stop.check_within_step(100.0 - elapsed_s, done)
        for elapsed_s, done in ((10.0, 0.9), (4.0, 0.5), (0.01, 0.125)):  # 4 s at the most
            stop.check_within_step(100.0 - elapsed_s, done)
        assert stop.has_come


def test_a_loaders_worker_works_on_through_stop_signals():
    windows, _ = plan_windows(400, max_length=8, stride=8, batch_size=2, train_ratio=0.9)
    tokens = (np.arange(400) % 7).astype(np.uint16)
    loaders = [
        make_loaders(tokens, windows, seed=1, num_workers=workers, device=torch.device("cpu"))[0]
        for workers in (0, 1)
    ]
    expected = [ids for ids, _ in loaders[0]]
    batches = iter(loaders[1])
    found = [next(batches)[0]]  # there is one, so the worker is well under way
    for worker in batches._workers:
        for number in HANDLED:
            os.kill(worker.pid, number)
    found += [ids for ids, _ in batches]
    assert len(found) > 10  # more than were on their way already
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def desert(is_worker: bool, err: Path) -> None:
    """What a process says, into a file, whose owner goes away, and which then has an error."""
    sys.stderr = err.open("w", buffering=1)
    if is_worker:
        defer_to_owner(0)
    hook, missed = sys.excepthook, threading.Event()
    sys.excepthook = lambda *error: (hook(*error), missed.set())
    address, _ = resource_sharer.DupFd(0)._id  # as a batch is offered to who asked for it
    with socket.socket(socket.AF_UNIX) as owner:
        owner.connect(address)
    assert missed.wait(60)
    hook(ZeroDivisionError, ZeroDivisionError("a bug of ours"), None)


@pytest.mark.skipif(sys.platform == "win32", reason="batches go another way there")
def test_a_worker_whose_owner_is_gone_is_silent_about_it_and_not_about_errors(tmp_path):
    processes = {
        is_worker: multiprocessing.get_context("fork").Process(
            target=desert, args=(is_worker, tmp_path / str(is_worker))
        )
        for is_worker in (True, False)
    }
    for process in processes.values():
        process.start()
    for is_worker, process in processes.items():
        process.join(60)
        said = (tmp_path / str(is_worker)).read_text(encoding="utf-8")
        assert ("_serve" in said) == (not is_worker)  # so the owner was missed
        assert "ZeroDivisionError: a bug of ours" in said
