"""On what tensors are computed."""

import torch

from esmerge.errors import InputError, first_line


def usable_device(device: torch.device | str) -> torch.device:
    """A device that is there and can do what is needed; `InputError` otherwise."""
    try:
        found = torch.empty(0, device=device).device
        torch.empty(0, device=found, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as error:
        # Torch goes on with a list of all that it is built with.
        reason = first_line(error).partition(". ")[0]
        raise InputError(f"device {device} cannot be used here: {reason}.") from error
    if found.type == "meta":
        raise InputError("device meta cannot be used here: it has no numbers; use cpu, or a GPU's.")
    return found
