"""Patches of bytes in place of tokens: where they start, and how sure a small byte model was of each byte."""
