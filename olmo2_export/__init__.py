"""Export OLMo to ONNX and TensorRT, and verify what was made."""

import runtimes.telemetry  # noqa: F401  # before any onnxruntime, also that of a peer's interpreter
