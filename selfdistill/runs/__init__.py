"""One run from its first line to its last, and what it leaves behind."""
