"""Judging which of two answers is better by another model, over any endpoint with OpenAI's chat
completions. Knows texts and HTTP; no model of ours, no file but the rubric, and no jax."""
