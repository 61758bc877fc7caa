"""The trainer and its distillation term, how they are built, and what is resumed."""
