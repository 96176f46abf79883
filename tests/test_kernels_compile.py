"""Every launch of the kernels compiles for each GPU generation and fits its shared memory; no GPU needed."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.experimental.gluon.nvidia import hopper  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from sparse_tx.attention import Block, Column, Full, Global, Summary, Window  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
KERNELS = {  # by the module that launches them
    "launch": ("attention_forward", "attention_delta", "chain_backward", "compact_backward"),
    "walks": (
        "window_forward", "window_backward", "column_forward", "column_backward",
        "window_forward_by_roles", "window_backward_by_roles",
        "column_forward_by_roles", "column_backward_by_roles", "narrow_backward_by_roles",
        "window_forward_by_warps", "column_forward_by_warps",
    ),
}  # fmt: skip


OPTIONS = ("num_warps", "maxnreg", "launch_pdl", "launch_cooperative_grid")


class Recorder:
    """Stands for a kernel in the module that launches it and keeps what it is launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **named: self.launches.append((self.kernel, args, named))


COLUMN_BACKWARD = "column_backward_by_roles"


def launches(monkeypatch, patterns, S, Dqk, Dv, dtype, capability, B=2, roles=True):
    from sparse_tx.attention.kernels import copies, launch, walks
    from sparse_tx.attention.kernels.plan import plan

    found = []
    for module in (launch, walks):
        for name in KERNELS[module.__name__.rpartition(".")[2]]:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    monkeypatch.setattr(launch, "is_large", lambda device: capability in (80, 90))
    monkeypatch.setattr(walks, "has_roles", lambda device: roles and capability == 90)
    monkeypatch.setattr(copies, "has_copy_engine", lambda device: capability >= 90)
    launch.forget_plans()
    H = len(patterns)
    q, k, v, out = (torch.empty(B, S, H, d, dtype=dtype, device="meta") for d in (Dqk, Dqk, Dv, Dv))
    lse = torch.empty(B, H, S, device="meta")
    numbers = plan(patterns)
    launch.forward(q, k, v, out, lse, numbers, 0.125)
    launch.backward(q, k, v, out, lse, out, lse, q, k, v, numbers, 0.125)
    monkeypatch.undo()
    launch.forget_plans()
    return found


def warps_of(monkeypatch):
    """Have longer columns taken by warps that work alone, too, and windows where more is under way."""
    from sparse_tx.attention.kernels import configs

    chosen = {
        ("window", 32, 32): configs.Warps(4, 2, 2), ("column", 32, 32): configs.Warps(4, 1),
        ("column", 64, 128): configs.Warps(2, 1), ("column", 64, 64): configs.Warps(1, 1),
    }  # fmt: skip
    monkeypatch.setattr(configs, "WARPS", configs.WARPS | {("forward", *key): value for key, value in chosen.items()})


def compiled(kernel, args, named, capability):
    constants = {n: x for n, x in named.items() if n not in OPTIONS}
    names = [n for n in kernel.arg_names if n not in constants]
    assert len(names) == len(args)
    signature, attrs = {}, {}
    for name, value in zip(names, args, strict=True):
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, hopper.TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}],{value.layout!r}>"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attrs[(kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        {n: signature[n] for n in kernel.arg_names},
        {(kernel.arg_names.index(n),): x for n, x in constants.items()},
        attrs,
    )
    options = {n: named[n] for n in ("num_warps", "maxnreg") if named.get(n)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


CASES = {
    "CIFAR-10 merged": ((Window(96) | Column(96),), 3072, 64, 128, torch.bfloat16),
    "enwik8": (tuple(Block(128) | Summary(128, 32, slot) for slot in range(4)), 12288, 64, 64, torch.bfloat16),
    "enwik8 by layers": ((Window(1024), *(Summary(1024, 128, s) for s in (0, 1))), 12288, 64, 64, torch.bfloat16),
    "ImageNet64 merged": ((Window(128) | Column(128),), 12288, 32, 32, torch.bfloat16),
    "audio": ((Window(256) | Column(256),), 65536, 64, 64, torch.float16),
    "window and column alone": ((Window(96), Column(96)), 3072, 64, 128, torch.bfloat16),
    "sliding": ((Window(64) | Column(64, 4) | Global(16),), 4096, 64, 64, torch.bfloat16),
    "full": ((Full(),), 4096, 64, 64, torch.bfloat16),
    "wide": ((Window(64) | Column(64), Block(64) | Summary(64, 16)), 4096, 256, 256, torch.bfloat16),
    "medium": ((Window(64) | Column(64), Block(64) | Summary(64, 16)), 4096, 128, 128, torch.bfloat16),
    "odd widths": ((Window(64) | Column(64), Block(64) | Summary(64, 16)), 999, 24, 40, torch.float16),
    "float32": ((Window(64) | Column(64), Block(64) | Summary(64, 16)), 4096, 64, 64, torch.float32),
    "wide float32": ((Window(64) | Column(64),), 4096, 256, 256, torch.float32),
}


# 8.9 takes the tiles of 8.6 and has as much shared memory: the workloads are enough there.
WHERE = [(case, c) for case in CASES for c in SHARED_KIB if c != 89 or case in list(CASES)[:5]]


@pytest.mark.parametrize(("case", "capability"), WHERE)
def test_every_launch_compiles_and_fits_shared_memory(monkeypatch, case, capability):
    found = launches(monkeypatch, *CASES[case], capability)
    assert found
    for kernel, args, named in found:
        binary = compiled(kernel, args, named, capability)
        assert binary.metadata.shared <= SHARED_KIB[capability] * 1024, (kernel.__name__, named)


@pytest.mark.parametrize("case", ["CIFAR-10 merged", "ImageNet64 merged", "audio", "window and column alone"])
def test_windows_without_roles_compile_with_the_copy_engine_too(monkeypatch, case):
    names = set()
    for roles in (True, False):
        for kernel, args, named in launches(monkeypatch, *CASES[case], 90, roles=roles):
            names.add(kernel.__name__)
            if not roles:
                assert compiled(kernel, args, named, 90).metadata.shared <= SHARED_KIB[90] * 1024
    narrow = "ImageNet" in case  # heads, that walk where there are no roles; forwards warps work alone
    assert f"{'narrow' if narrow else 'window'}_backward_by_roles" in names
    assert ("window_forward_by_roles" in names) != narrow
    assert ("window_backward" if narrow else "chain_backward") in names


@pytest.mark.parametrize(
    "patterns", [(Window(128) | Column(128),) * 4, (Window(100),) * 4 + (Column(128),) * 4], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_warps_that_work_alone_compile_and_fit_shared_memory(monkeypatch, patterns, dtype):
    warps_of(monkeypatch)
    found = launches(monkeypatch, patterns, 12288, 32, 32, dtype, 90)
    alone = [n for n in KERNELS["walks"] if n.endswith("by_warps")]
    assert sorted({name for kernel, _, _ in found if "_forward" in (name := kernel.__name__)}) == sorted(alone)
    for kernel, args, named in found:
        binary = compiled(kernel, args, named, 90)
        assert binary.metadata.shared <= SHARED_KIB[90] * 1024
        if kernel.__name__ in alone:
            assert "mma.sync" in binary.asm["ptx"]


@pytest.mark.parametrize(("N", "passes"), [(64, 0), (100, 1), (192, 1), (256, 1), (512, 2), (700, 3)])
def test_columns_by_roles_compile_and_fit_shared_memory(monkeypatch, N, passes):
    found = launches(monkeypatch, (Window(256) | Column(256),) * 2, 256 * N, 64, 64, torch.bfloat16, 90)
    columns = [launch for launch in found if launch[0].__name__.startswith("column")]
    assert [kernel.__name__ for kernel, _, _ in columns] == ["column_forward_by_roles"] + [COLUMN_BACKWARD] * passes
    for one in columns:
        assert compiled(*one, 90).metadata.shared <= SHARED_KIB[90] * 1024


@pytest.mark.parametrize("reach", [400, 512, 640])
def test_windows_of_more_tiles_compile_and_fit_shared_memory(monkeypatch, reach):
    found = launches(monkeypatch, (Window(reach),) * 2, 4096, 64, 64, torch.bfloat16, 90)
    windows = [launch for launch in found if launch[0].__name__.endswith("by_roles")]
    names = ["window_forward_by_roles"] + ["window_backward_by_roles"] * (2 if reach < 576 else 3)
    assert [kernel.__name__ for kernel, _, _ in windows] == names
    for one in windows:
        assert compiled(*one, 90).metadata.shared <= SHARED_KIB[90] * 1024


@pytest.mark.parametrize("pattern", [Window(40), Window(150), Window(256), Column(64), Column(32)], ids=str)
def test_narrow_heads_by_roles_compile_and_fit_shared_memory(monkeypatch, pattern):
    found = launches(monkeypatch, (pattern,) * 2, 64 * 96, 32, 32, torch.float16, 90)
    (one,) = [launch for launch in found if "_backward" in launch[0].__name__]
    assert one[0].__name__ == "narrow_backward_by_roles"
    assert compiled(*one, 90).metadata.shared <= SHARED_KIB[90] * 1024


def test_warps_work_alone_where_their_kernels_can(monkeypatch):
    cases = {
        "as it should be": ((Window(128) | Column(128),) * 4, 12288, 32, 32, torch.bfloat16),
        "a longer window": ((Window(200),) * 4, 12288, 32, 32, torch.bfloat16),
        "long columns": ((Column(64),) * 4, 12288, 32, 32, torch.bfloat16),
        "columns whose programs do not fit": ((Column(96),) * 4, 12288, 32, 32, torch.bfloat16),
        "a window of any heads": ((Window(128),) * 3, 12288, 32, 32, torch.bfloat16),
        "heads that are no group": ((Column(128),) * 3, 12288, 32, 32, torch.bfloat16),
        "global keys": ((Window(128) | Global(4),) * 4, 12288, 32, 32, torch.bfloat16),
        "wider heads": ((Window(128),) * 4, 12288, 64, 64, torch.bfloat16),
        "32 bits": ((Window(128),) * 4, 12288, 32, 32, torch.float32),
    }
    taken = set()
    for name, case in cases.items():
        if any(kernel.__name__.endswith("by_warps") for kernel, _, _ in launches(monkeypatch, *case, 90)):
            taken.add(name)
    assert taken == {"as it should be", "a window of any heads"}


@pytest.mark.parametrize(("tiles", "rest", "most"), [(768, 32, 528), (96, 16, 528), (48, 32, 132), (1024, 8, 132)])
def test_programs_that_go_along_a_sequence_are_one_wave(tiles, rest, most):
    from sparse_tx.attention.kernels.walks import _chunks

    length, chunks = _chunks(tiles, rest, 2, most)
    assert (chunks - 1) * length < tiles <= chunks * length
    assert most // 2 < chunks * rest <= most
    least = 3 * length
    length, chunks = _chunks(tiles, rest, 2, most, least)
    assert (chunks - 1) * length < tiles <= chunks * length
    assert length >= least or chunks == 1


def test_what_triton_compiled_is_launched_again_with_all_arguments_in_place():
    from sparse_tx.attention.kernels.handles import Described, Launch, layouts, operands

    class Kernel:
        arg_names = ("X", "n", "SIZE", "Y", "scale", "FLAG")

        def __getitem__(self, grid):
            def run(*args, **named):
                ran.append(("looked up", grid, args, named))
                return {grid: lambda *args: ran.append(("handle", grid, args))}

            return run

    ran = []
    x, y = torch.zeros(8, 16), torch.zeros(8, 16, dtype=torch.bfloat16)
    known = operands(layouts((x, y)), x.device)
    one = Launch(
        Kernel(), 3, Described(known[1], [8, 16], [16, 1], [4, 16]), 5, known[0], 0.5, FLAG=True, SIZE=16, num_warps=4
    )
    one((x, y))
    others = torch.ones(8, 16), torch.ones(8, 16, dtype=torch.bfloat16)
    one(others)
    (_, grid, args, named), (how, again, all_args) = ran
    assert named == {"FLAG": True, "SIZE": 16, "num_warps": 4}
    assert (how, grid, again) == ("handle", (3, 1, 1), (3, 1, 1))
    assert args[0].base is y
    assert all_args[0].base is others[1]
    assert vars(all_args[0]) | {"base": None} == vars(args[0]) | {"base": None}
    assert args[2] is x
    assert all_args[3] is others[0]
    assert (args[1], args[3]) == (5, 0.5)
    assert (*all_args[1:3], *all_args[4:]) == (5, 16, 0.5, True)
