"""Bytes of tensors to and from files, without a copy and without a lock around the transfer."""

import ctypes
import os

from torch import Tensor

# Linux moves at most 0x7FFFF000 bytes in one call.
_MAX_TRANSFER = 1 << 30


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; writing to it changes the tensor."""
    if not tensor.is_contiguous():
        raise ValueError(f"the bytes of a tensor of strides {tensor.stride()} are not in one piece")
    # A view of the tensor would hand the interpreter to another thread, which costs more than making the view.
    array = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    array.owner = tensor  # type: ignore[attr-defined]  # what is made from an address does not keep it alive
    return memoryview(array).cast("B")


def read_into(descriptor: int, tensor: Tensor, offset: int) -> None:
    """Fill a contiguous tensor from the bytes at `offset`; `EOFError` if the file ends before."""
    if not tensor.numel():
        return
    view, done = bytes_of(tensor), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + _MAX_TRANSFER]], offset + done)
        if not count:
            raise EOFError
        done += count


def write_from(descriptor: int, tensor: Tensor, offset: int) -> None:
    """Write a contiguous tensor's bytes at `offset`."""
    if not tensor.numel():
        return
    view, done = bytes_of(tensor), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + _MAX_TRANSFER], offset + done)
