"""The forms of a stored graph that a machine can run, and what PyTorch must compute for each.

table.py           the views of a variant: form, PyTorch's weights, precision and tolerance
static_forms.py    forms of a static-cache graph: exact, rounded, device, all positions
shared_forms.py    those of a shared-cache graph, and its int8 weights
first_call.py      a static-cache graph without its cache, for tools
openers.py         a graph on arrays: onnxruntime, TensorRT
runners.py         a view as a runner
weight_checks.py   stored weights against the checkpoint's
"""
