"""A Ray-distributed hyper-parameter study of large mini-batch training."""

__version__ = "0.1.0"
