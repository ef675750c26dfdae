"""Tiny models built offline, with random weights from the libraries' own config classes."""
