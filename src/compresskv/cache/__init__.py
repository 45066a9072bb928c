"""The KV cache that keeps only what a method chose."""
