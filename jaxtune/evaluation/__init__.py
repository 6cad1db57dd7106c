"""A model measured on a data set: losses, answers, groups of examples, and what they come to."""
