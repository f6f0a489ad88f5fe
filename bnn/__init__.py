"""Inference for Bayesian neural nets written in Pyro."""

from bnn.potential import Potential as Potential
