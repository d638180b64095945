"""Inference engines behind one contract; see `base`."""
