"""A diagonal plus low rank transition, the generalized delta rule of RWKV7."""
