"""Conversation -> text and what of it is trained. Knows the tokenizer's special tokens, no ids."""
