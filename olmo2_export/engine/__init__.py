"""TensorRT engines, compiled in a process of their own.

options.py   what can be asked for, and what is refused before anything expensive
build.py     package -> engine in trt/, in one atomic step; refit
renew.py     the same for one of many revisions: refit where the target can, else build
process.py   start the process, follow it, take its result
worker.py    the process
compiler.py  parse, check, build, write
refitter.py  other weights into a plan of full TensorRT
builder.py   what both tell the builder
progress.py  phases -> one fraction
plan.py      read a plan's kernels
"""
