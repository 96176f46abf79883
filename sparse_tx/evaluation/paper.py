"""What Child et al. 2019 report, to stand beside our own numbers (Tables 1 and 2)."""

from sparse_tx.data import Prepared

_BITS = {
    ("cifar10", "strided"): 2.80,
    ("cifar10", "fixed"): 2.85,
    ("cifar10", "full"): 2.82,
    ("enwik8", "fixed"): 0.99,
    ("enwik8", "strided"): 1.13,
    ("enwik8", "full"): 1.00,
    ("imagenet64", "strided"): 3.44,
}


def paper_bits(data: str, attention: str) -> float | None:
    """Bits per dim on the held-out split after full training; None where the paper has no such run."""
    return _BITS.get((data, attention))


def compares(prepared: Prepared) -> str:
    """What has to be said beside the paper's number: on which data it was, where ours are others."""
    version = prepared.meta.get("version")
    if version == "oord":
        return ", on this version of ImageNet64"
    if version is not None:
        return f", on van den Oord's ImageNet64: does not compare with {prepared.meta['version_name']}"
    return ", on the official data" if prepared.spec.source is not None else ""
