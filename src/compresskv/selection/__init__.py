"""Scores, budgets and the tokens they choose: tensors and integers only."""
