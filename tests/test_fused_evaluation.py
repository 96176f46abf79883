"""A checkpoint is scored by blocks like those that it was trained with: on a GPU, or in Triton's interpreter."""

import pytest
from kernels_here import DEVICE, MARKS

from evaluate import evaluate
from sparse_tx.model import Transformer
from train import train

pytestmark = MARKS


@pytest.mark.parametrize("fused", ["true", "false"])
def test_evaluation_finds_the_score_of_the_end_of_training_again(compose, monkeypatch, fused):
    place = "cpu" if DEVICE == "cpu" else "gpu"
    run = train(compose("train", "debug=fast", f"trainer={place}", f"trainer.fused={fused}", "trainer.max_steps=2"))
    residuals, fuse_blocks = [], Transformer.fuse_blocks

    def noted(model, residual=None):
        residuals.append(residual)
        fuse_blocks(model, residual)

    monkeypatch.setattr(Transformer, "fuse_blocks", noted)
    scored = evaluate(compose("evaluate", f"checkpoint={run['checkpoint']}", f"device={DEVICE}"))
    assert scored["bits_per_dim"] == pytest.approx(run["val/bits_per_dim"], abs=5e-7)  # which passed through float32
    assert residuals == ([None] if fused == "true" else [])
