"""MileBench (Song et al., arXiv 2404.18532): 29 sets of questions about many pictures, in the official folder layout.

`data` reads the sets, `prompt` writes and cuts prompts, `score` holds the metrics, `results` reads and writes the files
of predictions and scores, `runner` asks a model. The rules are those of the published code for LLaVA; the code is ours
(docs/milebench.md).
"""
