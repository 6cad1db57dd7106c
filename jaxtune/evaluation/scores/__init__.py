"""Scores of answers and losses, and how sure they are: texts and numbers in, numbers out.

Knows no model, no file and no jax. A score of a published package is counted by that package.
"""
