"""`python -m sparse_tx.data describe experiment=cifar10_strided`: what the model of a command will see.

Prepares the data as training would, prints counts, splits and hashes, and writes a few training windows to
OUTPUT/describe/NAME to look at and listen to: a grid of images, or text, or waveforms with their spectra and WAV files.
"""

import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sparse_tx import command, config


def describe(cfg: DictConfig) -> list[Path]:
    """cfg: what Hydra composes from configs/train.yaml. Returns the paths of the files."""
    checked = config.training(cfg)
    from sparse_tx.data import describe as of
    from sparse_tx.data import prepare
    from sparse_tx.data.spec import MIRRORED
    from sparse_tx.sampling import writers

    prepared = prepare(checked.data.spec())
    for line in of.facts(prepared, checked.seed):
        print(line)
    if checked.data.mirror:
        print(f"mirror: {MIRRORED[checked.data.kind]} in training, none of the examples")
    windows = of.examples(prepared, checked.seed)
    folder = Path(checked.output) / "describe" / re.sub(r"[^\w.-]", "_", _name(checked, prepared))
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "examples.png"
    paths = [picture]
    if checked.data.kind == "image":
        writers.grid([writers.image_of(window, window.size) for window in windows]).save(picture)
    elif checked.data.kind == "text":
        for window in windows:
            print(f"--- {len(window)} bytes begin:\n{of.text_of(window)}")
        of.draw_text(windows, picture)
    else:
        for n, window in enumerate(windows):
            paths.append(folder / f"example-{n}.wav")
            writers.write_wav(paths[-1], window)
        of.draw_audio(windows, picture)
    for path in paths:
        print(f"wrote: {path}")
    return paths


def _name(checked: Any, prepared: Any) -> str:
    return prepared.folder.name if prepared.folder is not None else f"{checked.data.name}-twin"


if __name__ == "__main__":
    if sys.argv[1:2] != ["describe"]:
        sys.exit(__doc__)
    del sys.argv[1]
    command.main(describe, "train")
