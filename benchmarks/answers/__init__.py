"""What cuts of long answers lose and cost."""
