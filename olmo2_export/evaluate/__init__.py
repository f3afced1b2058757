"""How good is a variant on a text: perplexity, KL divergence, and revisions side by side.

text.py            a text file of any length -> token ids -> windows
models.py          what can be evaluated: a variant, or a checkpoint in PyTorch
evaluate.py        windows -> perplexity with its error, and the comparison
revisions.py       a sweep: new weights into the same graph, each evaluated
revisions_plot.py  its picture
"""
