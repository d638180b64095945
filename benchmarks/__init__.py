"""Benchmarks; each prints its results with the machine, the package versions and the data."""
