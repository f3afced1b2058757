"""Where does a variant depart from PyTorch: the first layer, tensor and operation.

taps.py          the same tensor names in every form of graph; cut a graph where its layers meet
segments.py      run the cut graph, one segment in memory at a time
torch_layers.py  transformers' own layer, operation by operation
explain.py       which known mistake gives these numbers
layer_checks.py  compare each operation on what it was given
views.py         which graphs of a variant are looked at, against which weights, how exactly
locate.py        the first tensor that departs; the words of `verify --locate`
"""
