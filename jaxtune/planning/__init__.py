"""The costs of a run on hardware that is not here: arithmetic, and the real step compiled."""
