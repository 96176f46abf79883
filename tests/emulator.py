"""Runs kernels in Gluon (and in Triton) on a CPU: their Python code as it stands, on torch tensors for blocks.

Triton's interpreter knows no Gluon. This emulator knows nothing of layouts, of the warps inside a role, or of speed: it
shows that a kernel's numbers, addresses and masks are right. Each role is a thread of its own and barriers have the
phases of the hardware's, so it also shows that roles do not wait for each other for ever, read no place before it is
written and write none that a product or a copy still reads. What the hardware makes of layouts, fences and launches
that overlap only a GPU can show. Numbers are Python's: none overflows, and division rounds down below zero.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
import types
from types import SimpleNamespace

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.runtime.jit import JITFunction

PATIENCE = 60.0  # seconds at a barrier


class Int(int):
    """A number of a kernel: an int that has `to`."""

    def to(self, dtype):
        return self


def _int_operation(name):
    def operation(self, other):
        result = getattr(int, name)(self, other)
        return Int(result) if isinstance(result, int) and not isinstance(result, bool) else result

    return operation


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Int, _form, _int_operation(_form))


def raw(x):
    return x.data if isinstance(x, Block) else x


def block(x):
    return x if isinstance(x, Block) else Block(torch.as_tensor(raw(x)))


class Block:
    """A block of numbers in registers."""

    def __init__(self, data):
        self.data = data

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)
    type = property(lambda self: SimpleNamespace(layout=None))

    def to(self, dtype):
        return Block(self.data.to(dtype))

    def reshape(self, *shape):
        return Block(self.data.reshape(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape))

    def permute(self, order):
        return Block(self.data.permute(order))

    def split(self):
        return Block(self.data[..., 0]), Block(self.data[..., 1])

    def __getitem__(self, at):
        return Block(self.data[at])

    def __index__(self):
        return int(self.data)

    def __bool__(self):
        return bool(self.data)

    def __invert__(self):
        return Block(~self.data)

    def __neg__(self):
        return Block(-self.data)


def _block_operation(name):
    def operation(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        return Block(getattr(self.data, name)(raw(other)))

    return operation


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Block, _form, _block_operation(_form))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "lshift", "rshift"):
    setattr(Block, f"__{_name}__", _block_operation(f"__{_name}__"))


class Pointer:
    """Addresses in the memory of a tensor."""

    def __init__(self, base, offset=None):
        self.base = base
        self.memory = torch.empty(0, dtype=base.dtype).set_(base.untyped_storage())
        self.offset = base.storage_offset() if offset is None else offset
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    def __add__(self, other):
        return Pointer(self.base, raw(self.offset + raw(other)))

    __radd__ = __add__

    def at(self, mask):
        """Offsets, and which of them are meant."""
        offset = torch.as_tensor(self.offset)
        mask = torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.as_tensor(raw(mask))
        offset, mask = torch.broadcast_tensors(offset, mask)
        inside = (offset >= 0) & (offset < len(self.memory))
        assert bool((inside | ~mask).all()), "an address outside of its tensor"
        return torch.where(mask, offset, 0), mask


def load(pointer, mask=None, other=None, **_):
    offset, mask = pointer.at(mask)
    found = pointer.memory[offset]
    return Block(torch.where(mask, found, torch.as_tensor(0 if other is None else raw(other)).to(found.dtype)))


def store(pointer, value, mask=None, **_):
    offset, mask = pointer.at(mask)
    value = torch.as_tensor(raw(value)).to(pointer.memory.dtype).broadcast_to(offset.shape)
    pointer.memory[offset[mask]] = value[mask]


class Shared:
    """A block in shared memory, or a view of one."""

    def __init__(self, data):
        self.data = data

    shape = property(lambda self: list(self.data.shape))
    dtype = property(lambda self: self.data.dtype)

    def index(self, at):
        assert 0 <= int(at) < len(self.data), "a place outside of shared memory"
        return Shared(self.data[int(at)])

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, int(start), length))

    def reshape(self, shape):
        return Shared(self.data.view(list(shape)))

    def permute(self, order):
        return Shared(self.data.permute(order))

    def load(self, layout):
        return Block(self.data.clone())

    def store(self, value):
        self.data.copy_(value.data)

    def _reinterpret(self, dtype, shape, layout):
        assert dtype == self.dtype
        assert self.data.is_contiguous()
        strides = torch.empty(shape, device="meta").stride()
        return Shared(self.data.as_strided(shape, strides))


class Barrier:
    """Counts arrivals and bytes; its phase is over when none is missing. Copies that it is told of come when somebody
    waits for them: what is read without a wait is not there. changes: of all barriers so far, all but exactly."""

    changes = 0

    def __init__(self):
        self.changed = threading.Condition()
        self.copies = []

    def init(self, count):
        self.count = self.missing = count
        self.bytes = self.phase = self.waiting = 0

    def _settle(self):
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count
            self.changed.notify_all()

    def arrive(self, count=1, expected=0):
        with self.changed:
            assert self.missing >= count, "more arrivals than a phase has"
            self.missing -= count
            self.bytes += expected
            Barrier.changes += 1
            self._settle()

    def bring(self, copy, nbytes):
        with self.changed:
            self.copies.append((copy, nbytes))
            if self.waiting:
                self._deliver()

    def _deliver(self):
        while self.copies:
            copy, nbytes = self.copies.pop(0)
            copy()
            self.bytes -= nbytes
            assert self.bytes >= 0, "more bytes than were expected"
            self._settle()

    def wait(self, parity):
        """Until the phase of this parity is over: as the hardware has it, of the newest two alone."""
        _pause()
        with self.changed:
            self.waiting += 1
            self._deliver()
            over = self.changed.wait_for(lambda: self.phase & 1 != int(parity), PATIENCE)
            self.waiting -= 1
        assert over, "roles wait for each other"


class Barriers:
    def __init__(self, shape):
        self.all = [Barrier() for _ in range(shape[0])]
        _now["barriers"] += self.all

    def index(self, at):
        return self.all[int(at)]


class Descriptor:
    """What the copy engine knows of a tensor: zero outside of it, where nothing is stored either."""

    def __init__(self, given):
        self.base, self.block_shape = given.base, list(given.block_shape)
        self.block_type = SimpleNamespace(nbytes=math.prod(self.block_shape) * given.base.element_size())
        self.shape, self.strides = list(given.shape), list(given.strides)
        self.tensor = torch.as_strided(given.base, self.shape, self.strides)
        self.dtype, self.layout = given.base.dtype, getattr(given, "layout", None)

    def _inside(self, at):
        """The part of the block at these coordinates that lies inside, and where it lies in the block."""
        starts = [max(0, int(a)) for a in at]
        ends = [min(n, int(a) + b) for n, a, b in zip(self.shape, at, self.block_shape, strict=True)]
        if any(e <= s for s, e in zip(starts, ends, strict=True)):
            return None
        here = tuple(slice(s, e) for s, e in zip(starts, ends, strict=True))
        return here, tuple(slice(s - int(a), e - int(a)) for s, e, a in zip(starts, ends, at, strict=True))

    def load(self, at):
        found = torch.zeros(self.block_shape, dtype=self.dtype)
        if (inside := self._inside(at)) is not None:
            found[inside[1]] = self.tensor[inside[0]]
        return Block(found)

    def store(self, at, value):
        if (inside := self._inside(at)) is not None:
            self.tensor[inside[0]] = raw(value).reshape(self.block_shape)[inside[1]].to(self.dtype)


class Late(threading.local):
    """What a role has under way: copies of what products and copies out of shared memory read, to be compared with what
    lies there when they are waited for. It must not have changed by then."""

    def __init__(self):
        self.products, self.copies = [], []


late = Late()
jitter = random.Random(0)
delay = 0.0  # seconds that a step of a role, or a copy, takes at most: roles overtake each other
held = 0.0  # the share of copies that come last: when no role gets on without them
STILL = 0.01  # seconds in which none got on


def _pause():
    if delay:
        time.sleep(jitter.random() * delay)


def _until_still():
    before = None
    while before != (before := Barrier.changes):
        time.sleep(STILL)


def _unchanged(reads, what):
    for shared, before in reads:
        assert torch.equal(shared.data.nan_to_num(1e30), before.nan_to_num(1e30)), f"written while {what} read it"


def _to_shared(descriptor, at, barrier, shared):
    """Until it is there the place holds nothing."""
    found = descriptor.load(at).data
    shared.data.fill_(float("nan"))

    last = jitter.random() < held

    def bring():
        _pause()
        if last:
            _until_still()
        barrier.bring(lambda: shared.data.copy_(found), found.numel() * found.element_size())

    if delay or held:
        threading.Thread(target=bring, daemon=True).start()
    else:
        bring()


def _from_shared(descriptor, at, shared):
    descriptor.store(at, shared.data)
    late.copies.append([(shared, shared.data.clone())])


def _wait_for_copies(pendings):
    while len(late.copies) > pendings:
        _unchanged(late.copies.pop(0), "a copy")


def _product(a, b, acc=None, use_acc=True, **_):
    product = torch.matmul(a.data.float(), b.data.float())
    return Block(product if acc is None or not use_acc else product + acc.data)


def _begun_product(a, b, acc, use_acc=True, is_async=False):
    late.products.append([(x, x.data.clone()) for x in (a, b) if isinstance(x, Shared)])
    return _product(a, b, acc, use_acc)


def _wait_for_products(number, deps=()):
    _pause()
    while len(late.products) > number:
        _unchanged(late.products.pop(0), "a product")
    return deps[0] if len(deps) == 1 else tuple(deps)


def _nothing_late():
    """At the end of a role or a program."""
    assert not late.products, "a product was not waited for"
    assert not late.copies, "a copy out of shared memory was not waited for"


def _all_roles(roles, warps, registers):
    """Each role in a thread; the first error of any is raised."""
    errors = []

    def run(function, arguments):
        try:
            function(*arguments)
            _nothing_late()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=role, daemon=True) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not errors:
            thread.join(0.05)
    if errors:
        raise errors[0]


def _allocate(dtype, shape, layout):
    if dtype == torch.int64:
        return Barriers(shape)
    return Shared(torch.full(shape, float("nan"), dtype=dtype))  # what is read before it is written shows


def _either(condition, a, b):
    if not any(isinstance(x, Block) for x in (condition, a, b)):
        return a if condition else b
    a, b = (torch.as_tensor(raw(x)) for x in (a, b))
    return Block(torch.where(torch.as_tensor(raw(condition)), a, b))


def _pairwise(of_blocks, of_numbers):
    def operation(a, b):
        if isinstance(a, Block) or isinstance(b, Block):
            a, b = block(a).data, block(b).data
            return Block(of_blocks(a, b.to(a.dtype) if b.ndim == 0 else b))
        return Int(of_numbers(a, b))

    return operation


def _of_block(function):
    return lambda x, *_, **__: Block(function(raw(x)))


_now = {"program": (0,), "programs": (1,), "barriers": []}

COMMON = {
    "arange": lambda start, end, layout=None: Block(torch.arange(start, end)),
    "zeros": lambda shape, dtype, layout=None: Block(torch.zeros(shape, dtype=dtype)),
    "full": lambda shape, value, dtype, layout=None: Block(torch.full(shape, value, dtype=dtype)),
    "load": load,
    "store": store,
    "where": _either,
    "maximum": _pairwise(torch.maximum, max),
    "minimum": _pairwise(torch.minimum, min),
    "exp2": _of_block(torch.exp2),
    "exp": _of_block(torch.exp),
    "log2": _of_block(torch.log2),
    "log": _of_block(torch.log),
    "rsqrt": _of_block(torch.rsqrt),
    "sum": lambda x, axis: Block(x.data.sum(axis)),
    "max": lambda x, axis: Block(x.data.amax(axis)),
    "static_range": lambda *bounds: (Int(i) for i in range(*bounds)),
    "range": lambda *bounds, **_: (Int(i) for i in range(*bounds)),
    "program_id": lambda axis: Int(_now["program"][axis]),
    "num_programs": lambda axis: Int(_now["programs"][axis]),
    "cdiv": lambda a, b: Int(-(-a // b)),
    "convert_layout": lambda x, layout: x,
    "multiple_of": lambda x, _: x,
    "trans": lambda x: Block(x.data.mT),
    "dot": _product,
    "constexpr": lambda x: x,
    "allocate_shared_memory": _allocate,
    "warp_specialize": _all_roles,
    "NVMMADistributedLayout": lambda *_: None,
    "SliceLayout": lambda *_: None,
    "DotOperandLayout": lambda *_: None,
    "BlockedLayout": lambda *_: None,
    "SwizzledSharedLayout": lambda *_: None,
    "NVMMASharedLayout": SimpleNamespace(get_default_for=lambda *_: None),
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
    "extra": SimpleNamespace(cuda=SimpleNamespace(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None)),
}
MBARRIER = SimpleNamespace(
    init=lambda barrier, count: barrier.init(count),
    expect=lambda barrier, nbytes, pred=True: barrier.arrive(1, nbytes) if pred else None,
    arrive=lambda barrier, count=1, pred=True: barrier.arrive(count) if pred else None,
    wait=lambda barrier, phase, pred=True, deps=(): barrier.wait(phase) if pred else None,
    MBarrierLayout=lambda *_: None,
)
TMA = SimpleNamespace(
    async_copy_global_to_shared=_to_shared,
    async_copy_shared_to_global=_from_shared,
    store_wait=_wait_for_copies,
)
LANGUAGE = SimpleNamespace(**COMMON)
STANDS_FOR = {
    id(original): stand_in
    for original, stand_in in (
        (tl, LANGUAGE),
        (gl, LANGUAGE),
        (hopper.mbarrier, MBARRIER),
        (hopper.tma, TMA),
        (hopper.fence_async_shared, lambda: None),
        (hopper.warpgroup_mma, _begun_product),
        (hopper.warpgroup_mma_wait, _wait_for_products),
        (ampere.mma_v2, _product),
    )
}
_known = {}


def emulated(kernel):
    """The kernel's function, to be called with tensors, descriptors and numbers in place of what a GPU gets."""
    if kernel not in _known:
        scope = {}
        function = types.FunctionType(kernel.fn.__code__, scope, kernel.fn.__name__, kernel.fn.__defaults__)
        _known[kernel] = function  # before its scope is filled: kernels may call themselves
        for name, value in kernel.fn.__globals__.items():
            if id(value) in STANDS_FOR:
                value = STANDS_FOR[id(value)]
            elif isinstance(value, JITFunction):
                value = emulated(value)
            elif isinstance(value, tl.constexpr):
                value = value.value
            scope[name] = value
    return _known[kernel]


OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


class Emulated:
    """Stands for a kernel: kernel[grid](arguments) on tensors of the CPU."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launched = 0

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.launched += 1
            named = {name: x for name, x in named.items() if name not in OPTIONS}
            names = [name for name in self.kernel.arg_names if name not in named]
            given = dict(zip(names, map(_given, arguments), strict=True))
            _now["programs"] = grid
            for program in itertools.product(*map(range, grid)):
                _now["program"], _now["barriers"] = program, []
                emulated(self.kernel)(**given, **named)
                _nothing_late()
                assert not any(barrier.copies for barrier in _now["barriers"]), "a copy was not waited for"

        return launch


def _given(x):
    if isinstance(x, torch.Tensor):
        return Pointer(x)
    if hasattr(x, "block_shape"):
        return Descriptor(x)
    return Int(x) if isinstance(x, int) else x
