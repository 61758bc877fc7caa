"""Models come in, are looked into, answer, and go out."""
