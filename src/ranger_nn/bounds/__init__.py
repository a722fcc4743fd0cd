"""Bounds inference: axes, and the interval of each value that a region needs."""
