"""Decoding one token as one compiled program: what is traced, how it is built and kept, and when it runs."""
