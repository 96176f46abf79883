"""Training: the Lightning module, optimizers, callbacks, and `run`, which puts a run together."""
