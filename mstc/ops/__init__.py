"""The loop op: a tokenwise region as one operator that runs its body chunk by chunk."""
