"""One exception for each kind of expected failure; only programs turn them into exit codes."""

import re

# What a RuntimeError says where memory ran out: in the allocators of CUDA, XPU, Metal and NCCL, of
# CPUs (Linux and macOS; Windows; C++), in Metal's for one tensor, and in CUDA's libraries. A word
# such as "allocate" alone is in other messages too.
_OUT_OF_MEMORY = re.compile(
    "out of memory|DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc"
    "|Invalid buffer size: |(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|HIPBLAS)_STATUS_ALLOC_FAILED"
)


class PipelineError(Exception):
    """An expected failure: its message says what, where, what was allowed and what to do."""

    exit_code = 1


class SettingsError(PipelineError, ValueError):
    """A setting that can't be used: wrong name, type, range or combination."""

    exit_code = 2


class DataError(PipelineError, ValueError):
    """A text or tokenizer that can't be read or is too small to train on."""

    exit_code = 3


class CheckpointError(PipelineError):
    """A run folder or checkpoint that can't be continued, read or written over."""

    exit_code = 4


class NumericsError(PipelineError, ArithmeticError):
    """A loss or weight that stopped being a finite number."""

    exit_code = 5


class ResourceError(PipelineError, RuntimeError):
    """A device, disk or amount of memory that this machine doesn't have."""

    exit_code = 6


class LostRankError(ResourceError):
    """Another rank of this run has ended or does not answer."""


class BusyError(PipelineError):
    """A run folder that another program is training in."""

    exit_code = 7


class RunFinished(PipelineError):
    """Not a failure: the named run is already complete, or DRY_RUN ends it before training."""

    exit_code = 0


class Stopped(KeyboardInterrupt):
    """A signal, such as Ctrl-C, asked training to stop, and it stopped after a whole step."""

    def __init__(self, signal_number: int, message: str = "") -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type's name where there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device; a PipelineError never does."""
    if isinstance(error, RuntimeError) and not isinstance(error, PipelineError):
        return _OUT_OF_MEMORY.search(str(error)) is not None
    return isinstance(error, MemoryError)
