"""Trains, exports and checks the embedded demo model; see README.md in this folder."""

NAME = "edge-csp demo"
TEXT_FILE = "demo-text-f16.gguf"
MMPROJ_FILE = "demo-mmproj-f16.gguf"
