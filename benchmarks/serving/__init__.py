"""What the plugin costs and saves: vLLM with it and without it, in one run."""
