"""The verbs of the command line, a file each: HELP, declare(parser), run(args) -> exit code.

A verb declares its arguments, calls one function of the exporter and prints what it returns. Libraries are imported
inside `run`, so that a wrong flag is told at once.
"""
