"""Inference for Bayesian neural nets written in Pyro."""

from bnn.arviz_data import to_arviz as to_arviz
from bnn.distributions import EigenNormal as EigenNormal
from bnn.distributions import MatrixNormal as MatrixNormal
from bnn.norm_identities import norm_balance as norm_balance
from bnn.norm_identities import plot_norm_balance as plot_norm_balance
from bnn.per_site import equipartition as equipartition
from bnn.potential import Potential as Potential
from bnn.report_page import report as report
from bnn.sampling_cost import efficiency as efficiency
