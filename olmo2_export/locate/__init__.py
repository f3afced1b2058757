"""Where does a variant depart from PyTorch: the first layer, tensor and operation.

segments.py      run a graph that was cut where its layers meet, one segment in memory at a time
explain.py       which known mistake gives these numbers
layer_checks.py  compare each operation on what it was given
hidden_states.py the hidden state that an output is, and whether it is called so
stored_values.py compare stored weights, scales and rotary tables
locate.py        the first tensor that departs; the words of `verify --locate`
"""
