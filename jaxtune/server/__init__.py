"""An OpenAI-compatible endpoint and a page over models that are loaded already."""
