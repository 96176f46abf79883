"""The fused blocks' tests in Triton's interpreter, which must be chosen before triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_fused_blocks_pass_in_the_interpreter():
    here = Path(__file__).parent
    names = ("fused", "fused_evaluation", "products", "average", "muon", "muon_products")
    files = [str(here / f"test_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-n0", "-x", *files]
    done = subprocess.run(
        command, cwd=here.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_without_triton_or_a_gpu_fusing_says_what_to_do():
    import torch

    from sparse_tx.model import AttentionSpec, ModelSpec, Transformer

    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the kernels run here")
    spec = ModelSpec("text", 8, 1, 8, 1, 8, 8, AttentionSpec("full"))
    with pytest.raises(NotImplementedError, match=r"trainer\.fused=false"):
        Transformer(spec).fuse_blocks()
