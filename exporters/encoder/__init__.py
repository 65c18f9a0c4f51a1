"""Sentence encoders of the BERT family (arXiv 1810.04805): from a Transformers folder to a package.

``checkpoint`` reads one, ``graph`` writes it as ONNX, ``export`` makes the package.
"""
