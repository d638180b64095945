"""A model on disk: bundle, manifest, golden window, signature."""
