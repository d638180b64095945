"""Export of trained models to bundles. Requires PyTorch and ONNX (the extra `export`)."""
