"""Benchmarks: what pruning costs and gains, measured side by side in one run. `edge-csp bench` is the front of it.

Everything is measured in worker processes (worker.py) that a parent drives one step at a time (process.py), so that
variants alternate step by step, and the unpatched library takes part in the same run.
"""
