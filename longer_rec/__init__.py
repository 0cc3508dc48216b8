"""Training and serving rankers over ultra-long user histories, on TorchRec."""

__version__ = "0.1.0"
