"""What pruning does to answers: protocols, budgets and policies on the same questions, paired with the full cache.

albums.py     pictures and questions, drawn or from a folder
texts.py      the same without pictures: passages.py, notes.py, from what is in corpus.py
specs.py      policies with their settings, as written on the command line
cache.py      states of a sequence, answers and how far they are from the full cache
reading.py    an album in a context, what policies choose from it, and records of answers
protocols.py  when cells are evicted and what is asked then
continuing.py text that goes on, token by token
downsample.py fewer picture tokens instead of fewer cells
records.py    JSON lines, written as they are made
run.py        all of it in worker processes
stats.py      means, and intervals of paired differences
report.py     tables, Markdown, plots; text_report.py: of text, model by model
"""
