"""Evaluation of a model on held-out rows, and monitors that warn when a run collapses or learns nothing."""
