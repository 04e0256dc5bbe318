"""The random generators of a step, as JSON and back."""

import base64

import torch

from engine.devices import generator_state, set_generator_state


def random_state(device: torch.device) -> dict[str, str]:
    """The state of the generators that a step on this device draws from, as JSON."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = generator_state(device)
    return {
        name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()
    }


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """Set the generators as random_state() found them; one of another kind of device is left."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            set_generator_state(state, device)
