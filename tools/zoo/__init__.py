"""Fetches and trains the models on which eviction rules are measured; see README.md in this folder."""
