"""Variational guides for `pyro.infer.SVI`."""
