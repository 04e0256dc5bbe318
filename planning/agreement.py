"""Whether a device computes what the CPU does: logits, loss, gradients, and a step with a cache."""

import copy

import torch

from engine.errors import ResourceError
from engine.loss import next_token_loss
from engine.precision import Precision
from generation import evaluating
from model import GPTModel, KVCache

AGREEMENT = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}  # a relative error of right arithmetic


def disagreements(
    model: GPTModel, ids: torch.Tensor, targets: torch.Tensor, precision: Precision
) -> dict[str, float]:
    """How far a device's results are from those of the CPU in fp32: relative, by norm.

    ids and targets are (B, T), on the model's device. Compared are the logits, the loss, its
    gradients for the hidden states and for the parameters, and the logits of the last position by
    way of a KVCache.
    """
    found = _results(model, ids, targets, precision)
    on_cpu = copy.deepcopy(model).cpu()
    expected = _results(on_cpu, ids.cpu(), targets.cpu(), Precision("fp32", "", "cpu"))
    errors = {}
    for name, tensors in expected.items():
        pairs = zip(found[name], tensors, strict=True)
        difference = sum((one.float().cpu() - other).norm() ** 2 for one, other in pairs) ** 0.5
        size = sum(tensor.norm() ** 2 for tensor in tensors) ** 0.5
        errors[name] = (difference / size).item()
    return errors


def _results(
    model: GPTModel, ids: torch.Tensor, targets: torch.Tensor, precision: Precision
) -> dict[str, list[torch.Tensor]]:
    """What disagreements() compares, as one device computes it."""
    with evaluating(model), torch.enable_grad():
        with precision.autocast():
            hidden = model.hidden(ids)
            loss = next_token_loss(hidden, model.head.weight, targets)
        gradients = torch.autograd.grad(loss, [hidden, *model.parameters()])
        with torch.no_grad(), precision.autocast():
            cache = KVCache([ids.shape[1]] * len(ids), ids.shape[1], ids.device)
            for part in ids.split([ids.shape[1] - 1, 1], dim=1):
                newest = model.hidden(part, cache.advance(part.shape[1]))
            results = {
                "logits": [model.head(hidden)],
                "loss": [loss.detach()],
                "gradient of the hidden states": [gradients[0]],
                "gradients of the parameters": list(gradients[1:]),
                "logits with a cache": [model.head(newest[:, -1])],
            }
    return results


def precision_that_agrees(
    model: GPTModel, ids: torch.Tensor, targets: torch.Tensor, precision: Precision
) -> Precision:
    """The precision as it is, or fp32 where only that agrees with the CPU.

    Raises ResourceError where neither does: training would go on with wrong numbers. A NaN
    agrees with nothing.
    """
    for tried in (precision, Precision("fp32", "bf16 gives wrong numbers here", ids.device.type)):
        errors = disagreements(model, ids, targets, tried)
        if all(error <= AGREEMENT[tried.name] for error in errors.values()):
            return tried
    listed = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    raise ResourceError(
        f"{ids.device} computes wrong numbers, in fp32 too; relative to the CPU's: {listed}.\n"
        'Update torch or the system, or set DEVICE = "cpu".'
    )
