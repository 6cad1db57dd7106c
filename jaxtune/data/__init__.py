"""Records -> text -> tokens with weights -> fixed rows. Numpy and the tokenizer; no JAX."""
