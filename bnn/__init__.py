"""Inference for Bayesian neural nets written in Pyro."""

from bnn.arviz_data import to_arviz as to_arviz
from bnn.distributions import EigenNormal as EigenNormal
from bnn.distributions import MatrixNormal as MatrixNormal
from bnn.in_function_space import function_space as function_space
from bnn.in_function_space import summary as summary
from bnn.models import bayesian as bayesian
from bnn.norm_identities import norm_balance as norm_balance
from bnn.norm_identities import plot_norm_balance as plot_norm_balance
from bnn.per_site import equipartition as equipartition
from bnn.potential import Potential as Potential
from bnn.prediction import Prediction as Prediction
from bnn.prediction import predict as predict
from bnn.prior_draws import prior_predictive as prior_predictive
from bnn.sampling_cost import efficiency as efficiency
