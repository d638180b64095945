"""Export of trained models to bundles. Requires PyTorch and ONNX (the extra `export`)."""

from attnseg.runtime.engines.libraries import import_onnxruntime

import_onnxruntime()  # before any module below imports it, with its telemetry
