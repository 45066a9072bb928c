"""RULER's puzzles (Hsieh et al., arXiv 2404.06654): questions on documents that can be made of any length."""
