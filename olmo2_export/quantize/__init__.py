"""Weight quantisation, on torch tensors and numpy arrays: blocks of 4 or 8 bits, and W8A8.

blocks.py            the stored form: codes, scales, zero points, as onnxruntime's kernels read them
encode.py            weights -> codes, given who chooses scale and zero point
round_to_nearest.py  scale and zero point from the extremes of a block
search.py            scale and zero point of least squared error; needs no calibration
calibration.py       text -> token sequences
walk.py              the model layer by layer, one layer's weights in memory at a time
input_scales.py      one fixed scale per input of a linear, from calibration
gptq.py              rounding errors made good by the columns that follow; one matrix
gptq_walk.py        the same, layer by layer
self_text.py         the model -> sequences that it wrote
distill.py           codes and scales trained until the quantised model says what the float model says
sensitivity.py       which tensors deserve 8 bits
kv_cache.py          scales of keys and values, from calibration
int8.py              int8 weights with a scale per output channel
spool.py             finished tensors on disk
imported.py          the integers of a quantised checkpoint, in blocks as they are
recipes.py           name -> quantised weights of a whole checkpoint
linear.py            the stored form for TensorRT: int4, int8 and fp8
static.py            precision -> quantised linears of a TensorRT graph
"""
