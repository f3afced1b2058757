"""The verbs of `olmo2-run`, a file each: HELP, DESCRIPTION, declare(parser), run(args).

generate.py      a text
chat.py          a talk
score.py         texts -> scores
embed.py         texts -> vectors
prepare.py       weights as this machine reads them
generation.py    how text is generated: the flags of generate and chat, and what follows from them
documents.py     texts one by one, a line of JSON for each: score and embed
target.py        where a package runs, and what it is opened with: every verb
streams.py       stdin, files and stdout, as text
"""
