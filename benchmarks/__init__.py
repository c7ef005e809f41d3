"""Timings of the kernels against their peers, and what the penalties buy when a network is compressed."""
