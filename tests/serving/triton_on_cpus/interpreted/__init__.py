"""A backend "cpu" for PyPI's Triton, which has none: vLLM's CPU build takes a Triton only with one.

Nothing is compiled: with TRITON_INTERPRET=1 kernels are interpreted, and no backend is asked for anything.
"""
