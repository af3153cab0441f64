"""Mamba's selective scan: an elementwise state of D channels times N."""
