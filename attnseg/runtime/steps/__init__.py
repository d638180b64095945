"""Processing steps on NumPy arrays, one module per step."""
