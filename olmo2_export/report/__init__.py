"""The report page: HTML that needs nothing else, and markdown with pictures.

bench_file.py             read what `bench` wrote
logit_samples.py          logits and KL divergences beside PyTorch's
data.py                   gather everything that a page says
parts.py                  sections, tables, how numbers are read and written, text is escaped
plots.py                  the figures, with matplotlib
parity.py                 the sections on the distance to PyTorch
package.py                the sections on speed, size and contents
sections.py               their order
page.py                   write the folder
page.html.j2, page.md.j2  the templates
"""
