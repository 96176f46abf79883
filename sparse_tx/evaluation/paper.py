"""What Child et al. 2019 report, to stand beside our own numbers (Tables 1 and 2)."""

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
