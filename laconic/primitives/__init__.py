"""Scores, reductions, budgets over heads and layers, selections, and what becomes of the rest: pure functions on tensors."""
