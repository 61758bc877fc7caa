"""Loading of language models, access to their parts, generation, and export."""
