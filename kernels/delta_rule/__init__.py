"""The delta rule: DeltaNet, Gated DeltaNet (a scalar decay), and the same with a decay over K."""
