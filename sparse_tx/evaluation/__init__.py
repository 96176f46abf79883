"""Evaluation: bits per dim by the protocol of each kind of data, and count models beside them."""
