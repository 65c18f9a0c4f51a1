"""The owner's policy: the file, and what can be wrong with it."""
