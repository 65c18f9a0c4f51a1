"""Texts in the public domain: see README.md."""
