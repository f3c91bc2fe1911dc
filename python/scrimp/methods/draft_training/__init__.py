"""Training of draft maps (Hidden Transfer, Medusa heads): a ridge regression, then tuning through the frozen model."""

from .accuracy import Accuracy, Counter
from .frozen import FrozenModel
from .ridge import Moments
from .tuning import Tuner, Tuning

__all__ = ["Accuracy", "Counter", "FrozenModel", "Moments", "Tuner", "Tuning"]
