"""edge-csp: vision-language models on llama.cpp with a KV cache pruned by Cross-Self Pruning (CSP)."""

__version__ = "0.1.0"
