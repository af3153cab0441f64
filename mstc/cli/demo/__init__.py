"""The demo: the benchmark's workers train a byte-level Llama on the standard library's source."""
