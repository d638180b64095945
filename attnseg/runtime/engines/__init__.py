"""Inference engines behind one interface, see `attnseg.runtime.engines.base`."""
