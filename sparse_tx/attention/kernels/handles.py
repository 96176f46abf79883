"""Kernel launches planned once and repeated: what a launch needs to know of its tensors, and the launch itself.

Triton finds the compiled kernel of a launch from all its arguments: 12 to 36 us of the host for the kernels of this
package, more than the GPU needs for a small layer. A `Launch` keeps what was found and takes 3, and 2 more for each
descriptor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_tx.attention.kernels.shared_memory import block_descriptor


class Operand(NamedTuple):
    """A tensor of a plan: all that may be known of it but its address."""

    place: int  # among the tensors that a launch is called with
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool  # its address is a multiple of 16 bytes
    device: torch.device


class Described(NamedTuple):
    """An operand as the copy engine takes it; the fields of a TensorDescriptor."""

    operand: Operand
    shape: list[int]
    strides: list[int]
    block: list[int]
    gluon: bool = False  # for a kernel in Gluon, whose descriptors say how a block lies in shared memory


Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]


def layouts(tensors: Sequence[Tensor]) -> tuple[Layout, ...]:
    """Shape, strides, dtype and alignment of each: the key of a plan, from which `operands` makes its tensors."""
    return tuple([(t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors])


def operands(known: Sequence[Layout], device: torch.device) -> list[Operand]:
    return [Operand(i, *layout, device) for i, layout in enumerate(known)]


class Launch:
    """One launch of a kernel by so many programs, with tensors of the layouts that it was planned for.

    arguments: tensors as `Operand` or `Described`, and numbers. named: the kernel's constants and Triton's options.
    """

    def __init__(self, kernel: Any, programs: int, /, *arguments: object, **named: Any) -> None:
        self.kernel, self.grid, self.named = kernel, (programs, 1, 1), named
        self.arguments = arguments
        self._ready: _Ready | None = None

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        """tensors: of the layouts and on the device that it was planned for, which is the current device."""
        if self._ready is None:
            self._first(tensors)
            return
        handle, arguments, pointers, descriptors = self._ready
        arguments = arguments.copy()
        for at, place in pointers:
            arguments[at] = tensors[place]
        for at, place, kind, fields in descriptors:
            descriptor: Any = object.__new__(kind)  # its constructor checks what `_first` had it check
            descriptor.__dict__ = {**fields, "base": tensors[place]}
            arguments[at] = descriptor
        handle(*arguments)

    def _first(self, tensors: Sequence[Tensor]) -> None:
        """By Triton's own way, which compiles the kernel or finds it.

        What it compiles for is the types of the arguments, constants and options, which numbers are 1 or multiples of
        16 and which addresses are: a plan holds all of that, so what it found serves every later call. Not in the
        interpreter, which compiles nothing, nor on AMD GPUs, where it also looks at sizes of storages.
        """
        filled = [_filled(a, tensors) for a in self.arguments]
        compiled = self.kernel[self.grid](*filled, **self.named)
        if compiled is None or torch.version.hip is not None:
            return
        pairs = zip(self.arguments, filled, strict=True)
        names = self.kernel.arg_names  # a compiled kernel takes all by position
        both = [(self.named[n],) * 2 if n in self.named else next(pairs) for n in names]
        pointers, descriptors = [], []
        for at, (argument, value) in enumerate(both):
            if isinstance(argument, Operand):
                pointers.append((at, argument.place))
            elif isinstance(argument, Described):
                fields = {n: x for n, x in vars(value).items() if n != "base"}
                descriptors.append((at, argument.operand.place, type(value), fields))
        # At once: another thread may be about to make the same launch.
        self._ready = _Ready(compiled[self.grid], [argument for argument, _ in both], pointers, descriptors)


class _Ready(NamedTuple):
    """A compiled kernel with its arguments by position; where its pointers stand and which tensors they are; where its
    descriptors stand, which tensors they are and their fields but the tensor."""

    handle: Callable[..., object]
    arguments: list[object]
    pointers: list[tuple[int, int]]
    descriptors: list[tuple[int, int, type, dict[str, Any]]]


def _filled(argument: object, tensors: Sequence[Tensor]) -> object:
    if isinstance(argument, Operand):
        return tensors[argument.place]
    if isinstance(argument, Described):
        tensor = tensors[argument.operand.place]
        make = block_descriptor if argument.gluon else TensorDescriptor
        return make(tensor, argument.shape, argument.strides, argument.block)
    return argument
