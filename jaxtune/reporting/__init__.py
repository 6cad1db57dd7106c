"""The page of a run: what its directory holds and what its data is, gathered for `draw`. No JAX."""
