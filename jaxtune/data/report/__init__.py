"""Numbers about a dataset: counts, lengths, duplicates, columns. Knows no page and no terminal."""
