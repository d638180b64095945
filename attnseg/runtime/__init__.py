"""Inference runtime: scans to labels with NumPy and one inference engine, without PyTorch."""
