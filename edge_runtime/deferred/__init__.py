"""Requests that may be answered later: kept on disk until the tier that should answer them can be asked."""
