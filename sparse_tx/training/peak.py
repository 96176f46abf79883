"""Peak FLOP/s of GPUs by name: what a run's products are compared with."""

from __future__ import annotations

import re

import torch

# Words in a device's name -> TFLOP/s of 16-bit products (tensor cores, dense, summed in float32) and of float32 ones,
# by NVIDIA's datasheets. Their headline numbers "with sparsity" are twice the dense ones. The first that fits holds.
_TERAFLOPS: dict[str, tuple[float, float]] = {
    r"B200": (2250, 75),
    r"H[12]00 NVL": (835, 60),
    r"H100 PCIe": (756, 51),
    r"G?H200|H100": (989, 67),
    r"A100": (312, 19.5),
    r"A40": (150, 37.4),
    r"A30": (165, 10.3),
    r"RTX A6000": (155, 38.7),
    r"RTX 6000 Ada": (364, 91.1),
    r"L40S": (362, 91.6),
    r"L40": (181, 90.5),
    r"L4": (121, 30.3),
    r"RTX 4090": (165, 82.6),
    r"V100-SXM\d": (125, 15.7),
    r"V100-PCIE": (112, 14.0),
    r"T4": (65, 8.1),
}
_OTHER_CLOCKS = re.compile(r"\b(Laptop|Max-Q|MIG|D)\b")  # the same name for a smaller chip, or for a part of one


def peak_flops(name: str, *, half: bool) -> float | None:
    """FLOP/s of a GPU of this name in 16-bit products (half) or float32 ones; None for a name that is not known."""
    if _OTHER_CLOCKS.search(name):
        return None
    for words, (sixteen, thirty_two) in _TERAFLOPS.items():
        if re.search(rf"\b({words})\b", name):
            return 1e12 * (sixteen if half else thirty_two)
    return None


def device_peak(device: torch.device, *, half: bool) -> float | None:
    """`peak_flops` of a device; None for a CPU: an invented peak would say nothing."""
    return peak_flops(torch.cuda.get_device_name(device), half=half) if device.type == "cuda" else None
