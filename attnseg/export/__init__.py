"""Export of trained models to bundles. Requires PyTorch and ONNX (`attnseg[export]`)."""
