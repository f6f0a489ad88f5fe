"""Inference for Bayesian neural nets written in Pyro."""

from bnn.arviz_data import to_arviz as to_arviz
from bnn.distributions import EigenNormal as EigenNormal
from bnn.distributions import MatrixNormal as MatrixNormal
from bnn.potential import Potential as Potential
