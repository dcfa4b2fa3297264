"""Evaluation: how good the predictions are, in numbers and in pictures."""
