"""Benchmarks: what is measured is in workloads.py, what was measured in RESULTS.md."""
