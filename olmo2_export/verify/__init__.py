"""Is a package what PyTorch computes?

feeds.py                            the ways to feed a graph: modes x rows x lengths
measure.py                          run them and compare; decode freely
weight_checks.py                    stored weights against the checkpoint's
quantized.py, static.py, device.py  what variants for CPUs, for TensorRT and for CUDA must show beyond that
verify.py                           the verdict on a package; parity.json
"""
