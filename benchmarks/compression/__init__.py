"""Train with and without range regularization, compress, compare."""
