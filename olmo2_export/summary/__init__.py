"""What a package holds, without weights or a GPU.

graph.py    operators, weights, bits, inputs and outputs of a graph
engine.py   what an engine can do, what a step of it launches
package.py  check every file and gather the rest
text.py     the tables of `inspect`, and lines for `export` and `build`
plan_text.py what an export would take, for `export --dry-run`
"""
