"""What a run would cost on hardware that is not here: arithmetic, and the real step compiled."""
