"""Benchmarks: ratios against a baseline of the same run; see LOG.md for what was found."""
