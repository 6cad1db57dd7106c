"""The outside world's checkpoints: Hugging Face folders read and written without torch.

`layout` says how tensors become parameters and back, `families` what each `model_type` means,
`tensors` moves bytes, `load` and `export` walk the table in either direction. The package knows
nothing of training, and of text only that a tokenizer's files travel with the model.
"""
