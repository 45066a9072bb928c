"""Speed and memory of caches beside plain transformers, and beside what this machine could do at best."""
