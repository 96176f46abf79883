"""Fused Triton kernels for the sparse patterns."""


def unsupported(q, k, v, patterns):
    """Why the kernels cannot run these inputs; None if they can."""
    return "the fused kernels are not part of this version; use backend='blocked'"


def triton_attention(q, k, v, patterns, scale):
    raise NotImplementedError(unsupported(q, k, v, patterns))
