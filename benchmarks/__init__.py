"""Measurements. Run from the root of the checkout: `python -m benchmarks.<name>`.

This file has a purpose: fairscale installs a `benchmarks` package of its own, which would
hide a folder without one.
"""
