"""The command line, ``edge-glm``."""
