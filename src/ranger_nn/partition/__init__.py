"""Partitions: how the domain of some values is cut into regions. Descriptions only; no framework is imported."""
