"""What each module costs: the model with one group of linears in NF4 and all else as it is, against the model as it is."""

from halfbyte.evaluator.sensitivity.job import sensitivity
from halfbyte.evaluator.sensitivity.settings import SENSITIVITY_OPTIONS, Probing

__all__ = ["SENSITIVITY_OPTIONS", "Probing", "sensitivity"]
