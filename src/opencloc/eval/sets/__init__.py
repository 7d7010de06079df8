"""Readers of the evaluation sets, each from the files that people download; `item.py` says what they all give."""
