"""How good is a variant on a text: perplexity, KL divergence, and revisions side by side.

text.py               a text file of any length -> token ids -> windows
models.py             what can be evaluated: a variant, or a checkpoint in PyTorch
evaluate.py           windows -> perplexity with its error, and the comparison
revision_packages.py  the packages of a sweep: new weights into the same graph, and into the same engine
revisions.py          the sweep: each is evaluated
revisions_plot.py     its picture
"""
