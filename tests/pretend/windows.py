"""A pretended Windows: it lacks what our programs must not need, and its open files refuse.

A file that this process has open or mapped can be neither renamed nor replaced nor removed, nor a
folder that it is in; /proc tells which those are, so whatever opened them counts. A virus scanner
holds each fresh file for a moment, and now and then something holds an old one. Errors carry the
numbers that Windows gives them.
"""

import contextlib
import ctypes
import errno
import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.conftest import REPOSITORY

CAN_PRETEND = sys.platform == "linux"
REASONS = {
    5: "Access is denied",
    32: "The process cannot access the file because it is being used by another process",
    123: "The filename, directory name, or volume label syntax is incorrect",
    183: "Cannot create a file when that file already exists",
}
NO_SIGNS = re.compile(r'[<>"|?*\x00-\x1f]')  # in any name
NO_MODULES = ("fcntl", "resource", "termios", "pwd", "grp", "readline")
NO_NAMES = {
    "os": "fork killpg setsid getpgid getuid geteuid getgid nice uname sysconf statvfs getloadavg "
    "sched_getaffinity mkfifo chown pread pwrite wait waitid WNOHANG O_DIRECTORY O_NOFOLLOW",
    "signal": "SIGHUP SIGQUIT SIGKILL SIGALRM SIGCHLD SIGUSR1 SIGUSR2 SIGPIPE SIGSTOP SIGCONT "
    "ITIMER_REAL setitimer alarm pause sigwait siginterrupt pthread_sigmask pthread_kill",
    "sys": "abiflags",
}
SIGBREAK = 21
FILE_CALLS = ("rename", "replace", "unlink", "rmdir", "stat", "lstat")


class Windows:
    """What the pretended system does to files; refused has each call that it refused, in order."""

    def __init__(self, fresh_s: float, refused_share: float, seed: int) -> None:
        self.refused: list[tuple[str, str]] = []
        self._fresh_s, self._share = fresh_s, refused_share
        self._random = random.Random(seed)
        self._drawn: set[tuple[str, str]] = set()
        self._real = {name: getattr(os, name) for name in FILE_CALLS}

    def rename(self, source: Any, target: Any) -> None:
        """os.rename: to a name that nothing has."""
        if os.path.lexists(target):
            raise _as_windows(FileExistsError(errno.EEXIST, REASONS[183]), 183, source, target)
        self._move("rename", source, target)

    def replace(self, source: Any, target: Any) -> None:
        """os.replace: a file may take a file's place."""
        if os.path.isdir(target) or _open_below(target):
            raise self._refusal("replace", 5, source, target)
        self._move("replace", source, target)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        """os.unlink and os.remove."""
        if _open_below(_full(path, dir_fd)):
            raise self._refusal("unlink", 32, path)
        self._real["unlink"](path, dir_fd=dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        """os.rmdir."""
        if _open_below(_full(path, dir_fd)):
            raise self._refusal("rmdir", 32, path)
        self._real["rmdir"](path, dir_fd=dir_fd)

    def stat(self, path: Any, **options: Any) -> os.stat_result:
        """os.stat: of a name that may be one."""
        return self._real["stat"](_checked(path), **options)

    def lstat(self, path: Any, **options: Any) -> os.stat_result:
        """os.lstat, likewise."""
        return self._real["lstat"](_checked(path), **options)

    def _move(self, call: str, source: Any, target: Any) -> None:
        is_drawn = False
        if (drawn := (os.fspath(source), os.fspath(target))) not in self._drawn:
            self._drawn.add(drawn)
            is_drawn = self._random.random() < self._share
        if is_drawn or _open_below(source) or _age_s(Path(source)) < self._fresh_s:
            raise self._refusal(call, 5 if os.path.isdir(source) else 32, source, target)
        self._real[call](source, target)

    def _refusal(self, call: str, number: int, path: Any, other: Any = None) -> OSError:
        self.refused.append((call, os.fspath(path)))
        return _as_windows(PermissionError(errno.EACCES, REASONS[number]), number, path, other)


@contextlib.contextmanager
def windows(
    *, fresh_s: float = 0.2, refused_share: float = 0.05, seed: int = 0
) -> Iterator[Windows]:
    """Let this process be on Windows, as far as the modules of ours can tell that it has imported.

    A file or folder can't be renamed until nothing in it was written for fresh_s, and of all
    renames a share is refused the first time. The standard library and torch stay on Linux.
    """
    files = Windows(fresh_s, refused_share, seed)
    seen = {
        "os": _Seen(os, NO_NAMES["os"], name="nt"),
        "sys": _Seen(sys, NO_NAMES["sys"], platform="win32"),
        "signal": _Seen(signal, NO_NAMES["signal"], SIGBREAK=SIGBREAK, signal=_signal),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "msvcrt", _msvcrt())
        patch.setattr(ctypes, "windll", SimpleNamespace(kernel32=_Kernel32), raising=False)
        for name in NO_MODULES:
            patch.setitem(sys.modules, name, None)
        for name in FILE_CALLS:
            patch.setattr(os, name, getattr(files, name))
        patch.setattr(os, "remove", files.unlink)
        for module in list(filter(_is_ours, sys.modules.values())):
            for name, pretended in seen.items():
                if vars(module).get(name) is pretended.real:
                    patch.setattr(module, name, pretended)
        yield files


class _Seen:
    """A module as it is on Windows: some names are not there, some are others."""

    def __init__(self, real: ModuleType, missing: str, **others: Any) -> None:
        vars(self).update(real=real, _missing=missing.split(), **others)

    def __getattr__(self, name: str) -> Any:
        if name in self._missing:
            raise AttributeError(f"module {self.real.__name__!r} has no attribute {name!r}")
        return getattr(self.real, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)


def _is_ours(module: ModuleType | None) -> bool:
    path = Path(getattr(module, "__file__", None) or "/")
    is_installed = "site-packages" in path.parts  # in an environment within the repository
    is_here = path.is_relative_to(REPOSITORY) and not is_installed
    return is_here and not path.is_relative_to(REPOSITORY / "tests")


def _signal(number: int, handler: Any) -> Any:
    if number not in (signal.SIGABRT, signal.SIGFPE, signal.SIGINT, signal.SIGTERM, SIGBREAK):
        raise ValueError("invalid signal value")
    return signal.signal(number, handler)


class _Kernel32:
    """What of Windows' kernel32.dll is called."""

    @staticmethod
    def GlobalMemoryStatusEx(place: Any) -> int:
        """Fill in a MEMORYSTATUSEX: 16 GiB, of which 8 are free."""
        status = place._obj
        if status.size != 64:
            return 0
        status.total, status.available = 16 << 30, 8 << 30
        return 1


def _msvcrt() -> ModuleType:
    """Windows' module for locks on parts of files, by those of Linux."""
    import fcntl

    def locking(handle: int, mode: int, n_bytes: int) -> None:
        assert mode == module.LK_NBLCK, "only a lock that is tried at once is pretended"
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, n_bytes)
        except OSError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    module = ModuleType("msvcrt")
    module.LK_NBLCK, module.locking = 2, locking
    return module


def _as_windows(error: OSError, number: int, path: Any, other: Any = None) -> OSError:
    error.winerror, error.filename, error.filename2 = number, path, other
    return error


def _checked(path: Any) -> Any:
    if not isinstance(path, int) and NO_SIGNS.search(os.fsdecode(path)):
        raise _as_windows(OSError(errno.EINVAL, REASONS[123]), 123, path)
    return path


def _full(path: Any, dir_fd: int | None) -> str:
    return os.path.join("" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}"), path)


def _open_below(path: Any) -> list[str]:
    """The files at a path, or in the folder there, that this process has open or mapped."""
    place = os.path.join(os.path.realpath(os.path.dirname(path) or "."), os.path.basename(path))
    inside = os.path.join(place, "")
    return [
        file
        for file in {*_open_files(), *_mapped_files(), os.getcwd()}
        if file == place or file.startswith(inside)
    ]


def _open_files() -> Iterator[str]:
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the list itself
            file = os.readlink(f"/proc/self/fd/{handle}")
            if not os.path.isdir(file):  # such as one that is being listed
                yield file


def _mapped_files() -> Iterator[str]:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        yield line.split(maxsplit=5)[5] if line.count(" ") > 5 else ""


def _age_s(path: Path) -> float:
    """The seconds since anything of a file or folder was written."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    newest = max((file.stat().st_mtime for file in files), default=0.0)
    return time.time() - newest
