"""Sampling: one byte after the other, and writing images, text and audio."""
