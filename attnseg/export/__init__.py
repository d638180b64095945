"""The exporter: from a checkpoint to a bundle. Needs PyTorch and ONNX (`attnseg[export]`)."""
