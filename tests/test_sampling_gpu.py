"""Sampling on a GPU: a captured step draws what launches one by one draw, run after run.

Each in plain torch and as sampling takes it, by fused kernels; test_decode_kernels.py has more of these.
"""

import pytest
import torch
from test_decoder import ATTENTIONS, model_of, steps

from sparse_tx.model.decoder import Decoder
from sparse_tx.sampling.sampler import Sampler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


EITHER = pytest.mark.parametrize("fused", [False, None], ids=["plain", "fused"])


def drawn(model, prompts, count, **settings):
    sampler = Sampler(model, 36, 4, seed=3, **settings)
    samples = list(sampler.draw(prompts, count))
    return torch.cat([s.tokens for s in samples]), torch.cat([s.nats for s in samples])


@pytest.mark.parametrize("prompt", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ATTENTIONS)
@EITHER
def test_a_captured_step_draws_the_bytes_of_plain_launches_in_every_batch(fused, name, dtype, prompt):
    model = model_of(ATTENTIONS[name]).cuda()
    prompts = torch.randint(256, (3, prompt), dtype=torch.uint8)
    for settings in ({}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}):
        plain = drawn(model, prompts, 10, dtype=dtype, fused=fused, graph=False, **settings)
        captured = drawn(model, prompts, 10, dtype=dtype, fused=fused, graph=True, **settings)
        again = drawn(model, prompts, 10, dtype=dtype, fused=fused, graph=True, **settings)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, captured, again, strict=True))


@pytest.mark.parametrize("name", ATTENTIONS)
@EITHER
@torch.inference_mode()
def test_cached_logits_on_a_gpu_equal_the_forward_pass(fused, name):
    model = model_of(ATTENTIONS[name]).cuda()
    tokens = torch.randint(256, (2, 36), device="cuda")
    torch.testing.assert_close(steps(Decoder(model, 2, fused=fused), tokens), model(tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"top_k": 20, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
@EITHER
def test_a_step_never_waits_for_the_device(fused, name, settings):
    sampler = Sampler(model_of(ATTENTIONS[name]).cuda(), 36, 2, fused=fused, graph=False, **settings)
    nothing = torch.zeros(1, 0, dtype=torch.uint8)
    list(sampler.draw(nothing, 2))  # what is made once is made here
    with torch.inference_mode():
        torch.cuda.set_sync_debug_mode("error")
        try:
            sampler._position.fill_(7)
            sampler._step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_progress_adds_up_though_it_never_waits_for_the_newest_step():
    told = []
    sampler = Sampler(model_of(ATTENTIONS["full"], context=300).cuda(), 300, 2)
    list(sampler.draw(torch.zeros(1, 1, dtype=torch.uint8), 3, on_bytes=told.append))
    assert sum(told) == 3 * 299
