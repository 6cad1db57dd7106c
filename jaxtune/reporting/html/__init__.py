"""Pages for a person, of numbers and text. Knows no file format, no tokenizer and no device."""
