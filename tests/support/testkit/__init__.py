"""What the tests of the core share: the measure of exactness, captured graphs, models and random programs."""
