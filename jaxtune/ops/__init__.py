"""Pure functions on arrays: a plain reference first, the same signature for every implementation."""
