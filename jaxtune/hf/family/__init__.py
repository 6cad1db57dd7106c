"""What the families are made of; the table of them all is `hf/families.py`."""
