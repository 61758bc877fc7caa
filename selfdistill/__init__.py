"""One program for language models that learn from themselves."""
