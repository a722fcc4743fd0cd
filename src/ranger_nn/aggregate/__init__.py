"""Aggregators as commutative monoids: empty, lift, merge, finish."""
