"""The page of a run: its directory and its data, gathered for `html`. Knows no JAX."""
