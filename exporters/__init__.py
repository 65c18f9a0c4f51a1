"""Model files in, model package out: read checkpoints, quantize, write one graph per engine."""
