"""The embedded model, its album, and what draws further albums that it can read."""
