"""How a model lies over the ranks: whole on each (DDP), or in parts (FSDP2); both are torch's.

DDP sums the gradients up while a step's last backward pass is under way. FSDP2 keeps a part of
every weight, gradient and moment on each rank, and gathers a block's weights where it is used.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

from distributed.parallel import Parallel
from engine.compiling import not_compiled
from engine.precision import DTYPES, Precision


def build_in_parts(
    build: Callable[[], nn.Module], parallel: Parallel, precision: Precision, device: torch.device
) -> nn.Module:
    """What build() makes on the main rank's CPU, in parts on all ranks' devices; together.

    Only the main rank ever holds all of it. Each block's Linear layers are gathered as one, in the
    precision of their products; norms, embeddings and head are one group in fp32. Sums of
    gradients are fp32. Paper: Zhao et al. 2023, "PyTorch FSDP".
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    built = parallel.on_main(build)
    weights = {} if built is None else dict(built.named_parameters())
    with torch.device("meta"):
        model = build()
    mesh = init_device_mesh(device.type, (parallel.world,))
    dtype = None if precision.name == "fp32" else DTYPES[precision.name]
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
        fully_shard(linear, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    buffers = dict(model.named_buffers())  # which are on the CPU, with their values
    model.to_empty(device=device)
    # torch warns of what would be wrong if the outputs of Linear layers were changed in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
        for name, value in model.named_parameters():
            value.copy_(placed(weights.get(name), value, parallel))
        with precision.autocast():  # the first call decides which module is the outermost
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
    model.reshard()  # torch leaves the outermost gathered
    return model


def replica(model: nn.Module, parallel: Parallel) -> nn.Module:
    """The model as a step of all ranks calls it: it sums the gradients up, divided by the ranks.

    Together. The first backward pass tells DDP in which order gradients come, by which it cuts
    its messages. Here that is one without a target, so that each step of a run that goes on has
    its messages cut as if it had never stopped: sums of three numbers depend on their order.
    """
    if parallel.kind != "ddp":
        return model
    from torch.nn.parallel import DistributedDataParallel

    device = next(model.parameters()).device
    with warnings.catch_warnings():  # torch 2.11 has only this name for it, and later ones warn
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    devices = [device] if device.type == "cuda" else []
    with not_compiled(), torch.random.fork_rng(devices):
        for _ in range(2):  # the second pass cuts anew
            wrapped(ids, ids[:0], 1).backward()
            model.zero_grad()
    return wrapped


@contextlib.contextmanager
def summing_up(model: nn.Module, parallel: Parallel, *, now: bool) -> Iterator[None]:
    """Let backward passes in here keep their gradients to this rank, unless it is now that the
    ranks sum them up; model is what replica() gives."""
    if parallel.kind == "fsdp":
        model.set_requires_gradient_sync(now)
    with model.no_sync() if parallel.kind == "ddp" and not now else contextlib.nullcontext():
        yield


def flush_gradients(model: nn.Module, parallel: Parallel, precision: Precision) -> None:
    """Bring the gradients of a step that is given up to where zero_grad() finds them; together.

    FSDP2 keeps those that were not summed up yet in a place of its own.
    """
    if parallel.kind == "fsdp":
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with summing_up(model, parallel, now=True), precision.autocast():
            model(ids, ids[:0], 1).backward()


@contextlib.contextmanager
def whole(model: nn.Module, parallel: Parallel) -> Iterator[None]:
    """Have all of a model's weights on every rank, so that each may call it on its own; together.

    Weights of Linear layers are in the precision of their products then.
    """
    if parallel.kind != "fsdp":
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.unshard()
        group.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for group in groups:
            group.reshard()
            group.set_reshard_after_forward(group is not model, recurse=False)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers in one piece, where they lie in parts; together then."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors: dict[str, torch.Tensor], parallel: Parallel) -> dict[str, torch.Tensor]:
    """The tensors in one piece each, on the main rank, and nothing on others; together.

    Those in parts are gathered one by one, into the main rank's CPU memory.
    """
    found = {}
    for name, tensor in tensors.items():
        value = full(tensor)
        if parallel.is_main:
            found[name] = value if value is tensor else value.to("cpu")
    return found


def placed(value: torch.Tensor | None, like: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """The main rank's value, laid over the ranks as `like` is; together.

    value is on any device, of like's shape, and None on the other ranks.
    """
    if parallel.is_alone:
        return value
    from torch import distributed
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not parallel.is_main:
        value = torch.empty(like.shape, dtype=like.dtype)
    value = value.to(like.device, like.dtype).contiguous()
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    distributed.broadcast(value, src=0)
    return value
