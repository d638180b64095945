"""Pipelines from a volume to its labels: one interface, a host and a CUDA implementation."""
