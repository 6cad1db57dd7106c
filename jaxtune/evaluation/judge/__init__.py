"""Another model asked which of two answers is better, over any endpoint that speaks OpenAI's chat
completions. Knows texts and HTTP; no model of ours, no file but the rubric, and no jax."""
