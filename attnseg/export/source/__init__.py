"""The model to export: a checkpoint of the trainer, or an ONNX file of any trainer."""
