"""ONNX graphs and their conversion to fp16 and int8."""
