"""Markov chain Monte Carlo kernels for Pyro models on minibatches, and the runner that moves many chains at once."""

from bnn.kernels.amagold import AMAGOLD as AMAGOLD
from bnn.kernels.constant_sgd import ConstantSGD as ConstantSGD
from bnn.kernels.cyclical import CyclicalSGHMC as CyclicalSGHMC
from bnn.kernels.cyclical import CyclicalSGLD as CyclicalSGLD
from bnn.kernels.ggmc import GGMC as GGMC
from bnn.kernels.kronecker import Kronecker as Kronecker
from bnn.kernels.learning_rate import learning_rate_and_momentum as learning_rate_and_momentum
from bnn.kernels.learning_rate import step_size_and_friction as step_size_and_friction
from bnn.kernels.masde import MaSDE as MaSDE
from bnn.kernels.mcmc import MCMC as MCMC
from bnn.kernels.norm_adjusted import NormAdjustedSGHMC as NormAdjustedSGHMC
from bnn.kernels.norm_adjusted import implied_temperature as implied_temperature
from bnn.kernels.preconditioners import DrawCovariance as DrawCovariance
from bnn.kernels.preconditioners import DrawVariances as DrawVariances
from bnn.kernels.preconditioners import LayerWise as LayerWise
from bnn.kernels.preconditioners import Preconditioner as Preconditioner
from bnn.kernels.preconditioners import RMSprop as RMSprop
from bnn.kernels.schedules import Constant as Constant
from bnn.kernels.schedules import CosineCycles as CosineCycles
from bnn.kernels.schedules import PolynomialDecay as PolynomialDecay
from bnn.kernels.schedules import Schedule as Schedule
from bnn.kernels.sghmc import SGHMC as SGHMC
from bnn.kernels.sgld import SGLD as SGLD
from bnn.kernels.sgnht import SGNHT as SGNHT
from bnn.kernels.variance_reduction import SVRG as SVRG
from bnn.kernels.variance_reduction import ControlVariate as ControlVariate
