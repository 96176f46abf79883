"""What lies between two attentions of a decoding step as one launch or two, on a GPU of compute capability 9.0.

`test_decode_compile.py` compiles the kernels.
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


@pytest.mark.parametrize("chosen", [(16, 64, 6), (16, 128, 3), (32, 64, 6), "shares"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("change", WIDTHS, ids=str)
@torch.inference_mode()
def test_logits_are_as_near_the_truth_as_those_of_launches_one_by_one(monkeypatch, change, dtype, chosen):
    """Of rows that fill no program, and the same bits each time."""
    rows = 101
    model = model_of(ATTENTIONS["strided merged"], **{"layers": 3, "heads": 2} | change).cuda()
    tokens = torch.randint(256, (rows, 20), device="cuda")
    found = []
    for taken in (None, chosen, chosen):
        cut = -(-model.spec.ff // configs.SHARE_UNITS) if taken == "shares" else 0
        between = configs.Between(*taken) if taken and not cut else None
        monkeypatch.setattr(configs, "between", lambda *_, between=between: between)
        monkeypatch.setattr(configs, "shares", lambda *_, cut=cut: cut)
        decoder = Decoder(model, rows, fused=True, dtype=dtype)
        assert (decoder.kernels.between, decoder.kernels.cut) == (between, cut)
        found.append(steps(decoder, tokens))
    exact = model.double()(tokens)
    assert (found[1] - exact).abs().max() <= 2 * (found[0] - exact).abs().max()
    assert torch.equal(found[1], found[2])


@torch.inference_mode()
def test_a_narrow_model_takes_them_by_itself_shares_for_few_rows_and_one_launch_for_many():
    model = model_of(ATTENTIONS["strided"], width=64, heads=2, qk=32, layers=1).cuda()
    few, some, many = configs.VECTOR_ROWS, configs.SHARED_ROWS, configs.SHARED_ROWS + 1
    kernels = {n: Decoder(model, n, fused=True, dtype=torch.bfloat16).kernels for n in (few, some, many)}
    assert [kernels[n].cut for n in kernels] == [0, -(-model.spec.ff // configs.SHARE_UNITS), 0]
    one_launch = configs.between(many, 64, model.spec.ff, 2, configs.Gpu(132, 0))
    assert [kernels[n].between for n in kernels] == [None, None, one_launch]
