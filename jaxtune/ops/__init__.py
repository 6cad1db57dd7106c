"""Pure functions on arrays: a plain reference first, then others of the same signature."""
