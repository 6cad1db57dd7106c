"""What answers and losses are worth, and how sure that is: texts and numbers in, numbers out. No
model, no file and no jax; what a published package counts, that package counts here."""
