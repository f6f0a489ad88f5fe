"""Variational guides for `pyro.infer.SVI`."""

from bnn.guides.eigen_normal import AutoEigenNormal as AutoEigenNormal
from bnn.guides.factorized_normal import AutoFactorizedNormal as AutoFactorizedNormal
from bnn.guides.laplace import Laplace as Laplace
from bnn.guides.matrix_normal import AutoMatrixNormal as AutoMatrixNormal
from bnn.guides.natural_gradient import TraceNaturalGradient_ELBO as TraceNaturalGradient_ELBO
from bnn.guides.natural_gradient_descent import NaturalGradientDescent as NaturalGradientDescent
from bnn.guides.natural_gradient_descent import NaturalGradientOptimizer as NaturalGradientOptimizer
