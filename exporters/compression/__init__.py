"""Smaller and faster models that keep their answers: rounding by what a model does with a text.

Everything walks through the network once, a layer in memory at a time (:mod:`exporters.compression.numpy_network`).
"""
