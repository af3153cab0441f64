"""``mstc plan``: what a training step will need and take, before the machine is rented."""
