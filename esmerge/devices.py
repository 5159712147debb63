"""On what tensors are computed."""

import torch

from esmerge.errors import InputError, first_line


def usable_device(device: torch.device | str) -> torch.device:
    """A device that is there and can do what is needed; `InputError` otherwise."""
    try:
        found = torch.empty(0, device=device).device
        torch.empty(0, device=found, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {device} cannot be used here: {first_line(error)}") from error
    return found
