"""The model families and their parts; the table of them all is `hf/family/registry.py`."""
