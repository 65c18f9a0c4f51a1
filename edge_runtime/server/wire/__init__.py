"""Requests as they come over HTTP: one module for each kind, on the fields and checks that they share."""
