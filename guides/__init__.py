"""Variational guides for `pyro.infer.SVI`."""

from bnn.guides._energies import PerMember as PerMember
from bnn.guides.dropout import AutoDropout as AutoDropout
from bnn.guides.dropout_elbo import TraceDropout_ELBO as TraceDropout_ELBO
from bnn.guides.dropout_elbo import explicit_regularizer as explicit_regularizer
from bnn.guides.eigen_normal import AutoEigenNormal as AutoEigenNormal
from bnn.guides.ensemble import AutoEnsemble as AutoEnsemble
from bnn.guides.ensemble_elbo import TraceEnsemble_ELBO as TraceEnsemble_ELBO
from bnn.guides.factorized_normal import AutoFactorizedNormal as AutoFactorizedNormal
from bnn.guides.ivon import IVON as IVON
from bnn.guides.ivon import AutoIVON as AutoIVON
from bnn.guides.laplace import Laplace as Laplace
from bnn.guides.matrix_normal import AutoMatrixNormal as AutoMatrixNormal
from bnn.guides.natural_gradient import TraceNaturalGradient_ELBO as TraceNaturalGradient_ELBO
from bnn.guides.natural_gradient_descent import NaturalGradientDescent as NaturalGradientDescent
from bnn.guides.natural_gradient_descent import NaturalGradientOptimizer as NaturalGradientOptimizer
from bnn.guides.pbp import AutoPBP as AutoPBP
from bnn.guides.repulsion import FunctionRepulsion as FunctionRepulsion
from bnn.guides.repulsion import GaussianKernel as GaussianKernel
from bnn.guides.repulsion import SteinRepulsion as SteinRepulsion
from bnn.guides.repulsion import WeightRepulsion as WeightRepulsion
from bnn.guides.snapshots import AutoSnapshots as AutoSnapshots
from bnn.guides.swag import AutoSWAG as AutoSWAG
