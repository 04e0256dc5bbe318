"""The state of torch's random generators as JSON."""

import base64

import torch

from engine.devices import gpu_module


def random_state(device: torch.device) -> dict[str, str]:
    """The state of the generators that a step on this device uses, base64 by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = gpu_module(device).get_rng_state(device)
    return {
        name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()
    }


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """Restore what random_state() returned; the state of another type of device is ignored."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            gpu_module(device).set_rng_state(state, device)
