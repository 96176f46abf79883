"""What lies between two attentions of a decoding step as one launch, on a GPU of compute capability 9.0.

`test_decode_compile.py` compiles the kernel.
"""

import pytest
import torch
from kernels_here import INTERPRETED
from test_decoder import ATTENTIONS, model_of, steps

from sparse_tx.model.decode_kernels import configs
from sparse_tx.model.decoder import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        INTERPRETED or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
    ),
]

WIDTHS = [
    {"width": 256, "ff": 512, "qk": 128},
    {"width": 200, "ff": 264, "qk": 40, "activation": "relu2"},
    {"width": 40, "ff": 600, "qk": 16, "layers": 1},
    {"width": 256, "ff": 1024, "qk": 256, "heads": 4},
]


@pytest.mark.parametrize("chosen", [(16, 64, 6), (16, 128, 3), (32, 64, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", WIDTHS, ids=str)
@torch.inference_mode()
def test_logits_are_as_near_the_truth_as_those_of_launches_one_by_one(monkeypatch, change, dtype, chosen):
    """Of rows that fill no program, and the same bits each time."""
    rows = 101
    model = model_of(ATTENTIONS["strided merged"], **{"layers": 3, "heads": 2} | change).cuda()
    tokens = torch.randint(256, (rows, 20), device="cuda")
    found = []
    for between in (None, configs.Between(*chosen), configs.Between(*chosen)):
        monkeypatch.setattr(configs, "between", lambda *_, between=between: between)
        decoder = Decoder(model, rows, fused=True, dtype=dtype)
        assert decoder.kernels.between == between
        found.append(steps(decoder, tokens))
    exact = model.double()(tokens)
    assert (found[1] - exact).abs().max() <= 2 * (found[0] - exact).abs().max()
    assert torch.equal(found[1], found[2])


@torch.inference_mode()
def test_many_rows_of_a_narrow_model_take_it_by_themselves():
    model = model_of(ATTENTIONS["strided"], width=64, heads=2, qk=32, layers=1).cuda()
    taken = {rows: Decoder(model, rows, fused=True, dtype=torch.bfloat16).kernels.between for rows in (8, 200)}
    assert taken[8] is None
    assert taken[200] == configs.between(200, 64, model.spec.ff, 2, configs.Gpu(132, 0))
