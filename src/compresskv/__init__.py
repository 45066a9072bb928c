"""CompressKV: answer long prompts with a small KV cache."""

__version__ = "0.1.0"
