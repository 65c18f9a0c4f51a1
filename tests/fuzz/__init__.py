"""Malformed inputs, many of them, through the doors that users have; see :mod:`tests.fuzz.__main__`."""
