"""The forms of a stored graph that this machine can run, and what PyTorch must compute for each."""
