"""Find out where TensorRT and onnxruntime disagree, and make the smallest graph that shows it."""
