"""TensorRT engines, built from ONNX graphs."""
