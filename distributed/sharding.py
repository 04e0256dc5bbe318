"""Models on several ranks: replicated (torch's DDP) or sharded (FSDP2)."""

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
    """Build a model on the main rank's CPU and shard it over all ranks' devices. Collective.

    Each block's Linear layers are one FSDP group, in the run's precision; all else is one group in
    fp32, as are the reductions of gradients. Paper: Zhao et al. 2023, "PyTorch FSDP".
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
    buffers = dict(model.named_buffers())  # on the CPU, with their values
    model.to_empty(device=device)
    # torch warns in case the outputs of Linear layers are changed in place; ours are not
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    with torch.no_grad():
        for name, value in model.named_buffers():
            value.copy_(buffers[name])
        for name, value in model.named_parameters():
            value.copy_(placed(weights.get(name), value, parallel))
        with precision.autocast():  # the first call decides which module is the outermost
            model(torch.zeros(1, 1, dtype=torch.long, device=device))
    model.reshard()  # torch leaves the outermost module unsharded
    return model


def replica(model: nn.Module, parallel: Parallel) -> nn.Module:
    """The model that training steps call, wrapped in DDP if it is replicated. Collective.

    DDP rebuilds its buckets after the first backward pass. That one is made here, without targets,
    so that resumed runs have the same buckets: an all-reduce's last bits depend on them.
    """
    if parallel.kind != "ddp":
        return model
    device = next(model.parameters()).device
    with warnings.catch_warnings():  # torch 2.11 has only this name for it, and later ones warn
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    devices = [device] if device.type == "cuda" else []
    with not_compiled(), torch.random.fork_rng(devices):
        for _ in range(2):  # the second pass rebuilds the buckets
            wrapped(ids, ids[:0], 1).backward()
            model.zero_grad()
    return wrapped


@contextlib.contextmanager
def summing_up(model: nn.Module, parallel: Parallel, *, now: bool) -> Iterator[None]:
    """Synchronize the gradients of a replica()'s backward passes in here only if `now`."""
    if parallel.kind == "fsdp":
        model.set_requires_gradient_sync(now)
    with model.no_sync() if parallel.kind == "ddp" and not now else contextlib.nullcontext():
        yield


def flush_gradients(model: nn.Module, parallel: Parallel, precision: Precision) -> None:
    """Move an abandoned step's gradients from FSDP2's own buffers to the parameters. Collective."""
    if parallel.kind == "fsdp":
        ids = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        with summing_up(model, parallel, now=True), precision.autocast():
            model(ids, ids[:0], 1).backward()


@contextlib.contextmanager
def whole(model: nn.Module, parallel: Parallel) -> Iterator[None]:
    """Keep a model unsharded on every rank, Linear layers in the run's precision. Collective."""
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
    """A tensor, unsharded where it is a DTensor. Collective then."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors: dict[str, torch.Tensor], parallel: Parallel) -> dict[str, torch.Tensor]:
    """The unsharded tensors on the main rank, in CPU memory if sharded; {} on others."""
    found = {}
    for name, tensor in tensors.items():
        value = full(tensor)
        if parallel.is_main:
            found[name] = value if value is tensor else value.to("cpu")
    return found


def placed(value: torch.Tensor | None, like: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """Send the main rank's value (None on others) to all ranks, sharded as `like`. Collective."""
    if value is None:
        value = torch.empty(like.shape, dtype=like.dtype)
    if parallel.is_alone:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device, like.dtype).contiguous()
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    torch.distributed.broadcast(value, src=0)
    return value
