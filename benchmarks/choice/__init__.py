"""Which settings to make the default: candidates on several models, judged by the worst case."""
