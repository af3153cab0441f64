"""Linear attention with a scalar decay per head: none, constant, or one per token."""
