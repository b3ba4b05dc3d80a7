"""Parallel-R1: train language models to think in parallel, as a plug-in on released verl and vLLM."""

__version__ = "0.1.0"
