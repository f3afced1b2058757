"""Weight quantisation, on torch tensors and numpy arrays: blocks of 4 or 8 bits, and W8A8.

blocks.py            the stored form: codes, scales, zero points, as onnxruntime's kernels read them
encode.py            weights -> codes, given who chooses scale and zero point
round_to_nearest.py  scale and zero point from the extremes of a block
search.py            scale and zero point of least squared error; needs no calibration
calibration.py       text -> token sequences
sweep.py             the model layer by layer, one layer's weights in memory at a time
statistics.py        peak and mean square of every linear's inputs
gptq.py              rounding errors made good by the columns that follow; one matrix
gptq_sweep.py        the same, layer by layer
sensitivity.py       which tensors deserve 8 bits
int8.py              per-channel 7-bit weights of the W8A8 graph, and its outlier columns
spool.py             finished tensors on disk
names.py             the checkpoint's names of what is quantised
recipes.py           name -> quantised weights of a whole checkpoint
"""
