"""Does a model fit float16, and which parts must not be computed in it?

values.py    the values of a float16 graph under names people know, in PyTorch
simulate.py  the model with float16's roundings
safety.py    measure, name what overflows, propose the smallest float32 islands, prove them
report.py    say it in words
"""
