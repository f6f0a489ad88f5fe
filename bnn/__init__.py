"""Inference for Bayesian neural nets written in Pyro."""

from bnn.arviz_data import to_arviz as to_arviz
from bnn.calibration import accuracy_rejection as accuracy_rejection
from bnn.calibration import reliability as reliability
from bnn.distances import agreement as agreement
from bnn.distances import total_variation as total_variation
from bnn.distances import wasserstein as wasserstein
from bnn.distributions import EigenNormal as EigenNormal
from bnn.distributions import MatrixNormal as MatrixNormal
from bnn.held_out import score as score
from bnn.in_function_space import function_space as function_space
from bnn.in_function_space import summary as summary
from bnn.leave_one_out import loo_report as loo_report
from bnn.models import bayesian as bayesian
from bnn.norm_identities import norm_balance as norm_balance
from bnn.norm_identities import plot_norm_balance as plot_norm_balance
from bnn.per_site import equipartition as equipartition
from bnn.potential import Potential as Potential
from bnn.prediction import Prediction as Prediction
from bnn.prediction import predict as predict
from bnn.predictive_ranks import coverage as coverage
from bnn.predictive_ranks import pit as pit
<<<<<<< HEAD
from bnn.report_page import report as report
=======
from bnn.prior_draws import prior_predictive as prior_predictive
>>>>>>> 2bbe8b3ae2cb755afbcc44311c2476fb61921270
from bnn.sampling_cost import efficiency as efficiency
from bnn.scoring import classification_scores as classification_scores
from bnn.scoring import gaussian_scores as gaussian_scores
from bnn.scoring import regression_scores as regression_scores
from bnn.temperature_scaling import calibrated_nll as calibrated_nll
from bnn.temperature_scaling import fit_temperature as fit_temperature
