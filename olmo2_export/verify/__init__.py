"""Is a package what PyTorch computes?

feeds.py    the ways to feed a graph: modes x rows x lengths
measure.py  what PyTorch says; run a graph in all ways and compare; decode freely
portable.py padded batches as other runtimes feed them
padded.py   scores of batches padded on either side, as transformers pads them
beside.py   hidden states and sentence embeddings
adapters.py LoRA adapters that are chosen at run time
checks.py   calibration that repeats; quality on text
variant.py  one variant: a loop over its views
by_layer.py the same for a model that is larger than memory
verify.py   the verdict on a package; parity.json
"""
