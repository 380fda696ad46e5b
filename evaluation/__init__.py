"""Grading of checkpoints: every figure with its n, chance level and confidence interval."""
