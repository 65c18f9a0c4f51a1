"""Folders that other tools have written, taken as they are: their graphs run unchanged."""
