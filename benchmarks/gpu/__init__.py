"""What is to be known of CompressKV on a machine with a GPU, in one run."""
