"""Numbers and text -> what a person reads. Knows no file format, no tokenizer and no device."""
