"""What a model will see: counts, splits and hashes of a prepared dataset, and a few examples as files to look at."""

import textwrap
import warnings
from pathlib import Path

import numpy as np

from sparse_tx.data.mu_law import RATE, expand_mu_law
from sparse_tx.data.order import TrainingOrder
from sparse_tx.data.prepare import Prepared
from sparse_tx.data.store import SPLITS
from sparse_tx.errors import UserError

EXAMPLES = {"image": 64, "text": 3, "audio": 3}
SHOWN = 300  # bytes of a text


def facts(prepared: Prepared, seed: int) -> list[str]:
    """Lines of `key: value`."""
    spec, meta = prepared.spec, prepared.meta
    unit = "images" if spec.kind == "image" else "bytes"
    lines = [f"data: {prepared.title}", f"source: {meta['source']}"]
    lines += [f"{key}: {meta[key]}" for key in ("version", "encoding", "decoder", "python") if key in meta]
    order = TrainingOrder(prepared.split("train"), spec.kind, spec.context, seed)
    windows = int(order.sizes(np.array([0]))[0])
    lines.append(f"windows: {windows:,} of {spec.context:,} bytes in the first epoch of seed {seed}")
    for split in SPLITS:
        bytes_ = int(np.prod(meta["shapes"][split], dtype=np.int64))
        parts = [f"{meta['counts'][split]:,} {unit}"]
        if spec.kind == "image":
            parts.append(f"{bytes_:,} bytes")
        if spec.kind == "audio":
            names = meta.get("recordings", {}).get(split)
            parts.append(f"{bytes_ / RATE / 60:.1f} minutes" + (f" in {len(names)} recordings" if names else ""))
        lines.append(f"{split}: {', '.join(parts)}, sha256 {meta['sha256'][split]}")
    for split in ("validation", "test"):
        for recording in meta.get("recordings", {}).get(split, []):
            lines.append(f"{split} recording: {recording['name']}, {recording['samples'] / RATE:.1f} s")
    lines.append(f"split rule: {meta['split_rule']}")
    if "left_out" in meta:
        lines.append(f"left out: {meta['left_out']} that cannot be used, such as {meta['left_out_files'][0]}")
    hashes = meta["sha256"].get("source", {})
    files = hashes.items() if isinstance(hashes, dict) else [("source", hashes)]
    shown = list(files)[:5]
    lines += [f"sha256 of {name}: {digest}" for name, digest in shown]
    if len(files) > len(shown):
        lines.append(f"sha256 of {len(files) - len(shown)} more: see {prepared.folder}/meta.json")
    if prepared.folder is not None:
        lines.append(f"prepared in: {prepared.folder}")
    return lines


def examples(prepared: Prepared, seed: int) -> np.ndarray:
    """(N, context) uint8: the first windows that training with this seed will see."""
    spec, train = prepared.spec, prepared.split("train")
    order = TrainingOrder(train, spec.kind, spec.context, seed)
    starts = [order.window(k) for k in range(EXAMPLES[spec.kind])]
    return np.stack([train[s] if spec.kind == "image" else train[s : s + spec.context] for s in starts])


def text_of(window: np.ndarray) -> str:
    """The first bytes of a window as they may be printed: others as \\x.."""
    data = window[:SHOWN].tobytes()
    return "".join(
        c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in data.decode("utf-8", "backslashreplace")
    )


def draw_text(windows: np.ndarray, path: Path):
    """How often each byte occurs, and the first bytes of the windows."""
    pyplot = _pyplot()
    figure, (counts, page) = pyplot.subplots(2, 1, figsize=(10, 8), layout="constrained")
    counts.bar(range(256), np.bincount(windows.reshape(-1), minlength=256), width=1.0)
    counts.set(title=f"bytes of {windows.size:,}", xlabel="value", yscale="log", xlim=(-1, 256))
    page.axis("off")
    lines: list[str] = []
    for window in windows:
        for line in text_of(window).splitlines()[:8]:
            lines += textwrap.wrap(line, 120, replace_whitespace=False) or [""]
        lines.append("-" * 40)
    page.text(0, 1, "\n".join(lines).replace("$", r"\$"), family="monospace", fontsize=8, va="top")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # of a script that the font lacks: a box; printed it is whole
        figure.savefig(path, dpi=90)
    pyplot.close(figure)


def draw_audio(windows: np.ndarray, path: Path):
    """Waveform and spectrogram of each window, as they are heard: 0 to 6 kHz."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, len(windows), figsize=(5 * len(windows), 6), layout="constrained", squeeze=False)
    for (wave_axis, spectrum_axis), window in zip(axes.T, windows, strict=True):
        wave = expand_mu_law(window) / 32767
        seconds = np.arange(len(wave)) / RATE
        step = max(1, len(wave) // 20_000)
        wave_axis.plot(seconds[::step], wave[::step], linewidth=0.4)
        wave_axis.set(ylim=(-1, 1), xlim=(0, seconds[-1]), title=f"{len(wave):,} samples, {len(wave) / RATE:.1f} s")
        width = min(1024, len(wave) // 2)
        wave = wave + 1e-5 * np.random.default_rng(0).standard_normal(len(wave))  # silence has no logarithm
        spectrum_axis.specgram(wave, NFFT=width, Fs=RATE, noverlap=width // 2, vmin=-120, vmax=-30)
        spectrum_axis.set(xlabel="s", ylabel="Hz")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("pictures of text and audio need matplotlib: pip install 'sparse-tx[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
