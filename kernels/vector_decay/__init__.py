"""Linear attention with a decay per channel of K: GLA, HGRN2, and RWKV6 with its bonus."""
