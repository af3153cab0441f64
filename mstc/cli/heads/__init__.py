"""Heads and losses in the forms in which people write them, run by several systems: what each does with them."""
