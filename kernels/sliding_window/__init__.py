"""Causal softmax attention over a window, with attention sinks, and the merging of partial softmaxes."""
