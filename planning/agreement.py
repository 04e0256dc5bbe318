"""Whether a device agrees with the CPU: on logits, loss, gradients, and decoding with a cache."""

import copy

import torch

from engine.errors import ResourceError
from engine.loss import next_token_loss
from engine.precision import Precision
from generation import evaluating
from model import GPTModel, KVCache

AGREEMENT = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}  # the largest relative errors


def disagreements(
    model: GPTModel, ids: torch.Tensor, targets: torch.Tensor, precision: Precision
) -> dict[str, float]:
    """The relative errors, by norm, of results on (B, T) ids and targets against the CPU's fp32."""
    found = _results(model, ids, targets, precision)
    fp32 = Precision("fp32", "", "cpu")
    expected = _results(copy.deepcopy(model).cpu(), ids.cpu(), targets.cpu(), fp32)
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
    with evaluating(model), torch.enable_grad():
        with precision.autocast():
            hidden = model.hidden(ids)
            loss = next_token_loss(hidden, model.head.weight, targets)
        gradients = torch.autograd.grad(
            loss, [hidden, *(p for p in model.parameters() if p.requires_grad)]
        )
        with torch.no_grad(), precision.autocast():
            cache = KVCache([ids.shape[1]] * len(ids), ids.shape[1], ids.device)
            for part in ids.split([ids.shape[1] - 1, 1], dim=1):
                newest = model.hidden(part, cache.advance(part.shape[1]))
            return {
                "logits": [model.head(hidden)],
                "loss": [loss.detach()],
                "gradient of the hidden states": [gradients[0]],
                "gradients of the parameters": list(gradients[1:]),
                "logits with a cache": [model.head(newest[:, -1])],
            }


def precision_that_agrees(
    model: GPTModel, ids: torch.Tensor, targets: torch.Tensor, precision: Precision
) -> Precision:
    """The given precision, or fp32 if only that agrees with the CPU; ResourceError if neither."""
    for tried in (precision, Precision("fp32", "bf16 gives wrong numbers here", ids.device.type)):
        errors = disagreements(model, ids, targets, tried)
        if all(error <= AGREEMENT[tried.name] for error in errors.values()):
            return tried
    listed = ", ".join(f"{name} {error:.2g}" for name, error in errors.items())
    raise ResourceError(
        f"{ids.device} computes wrong numbers, in fp32 too; relative to the CPU's: {listed}.\n"
        'Update torch or the system, or set DEVICE = "cpu".'
    )
