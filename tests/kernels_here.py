"""Where the kernels' tests run: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) on a CPU; skipped elsewhere.

Imported before anything that imports triton.
"""

import os

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

MARKS = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
LOW = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter multiplies bfloat16 wrongly
