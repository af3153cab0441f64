"""From costs to choices: chunks, what is kept, what is recomputed."""
