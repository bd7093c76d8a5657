"""What devices really take, fitted to the steps that they ran: corrections of the figures that plans are made from."""

from hexmesh.calibration.factors import Factors, applied
from hexmesh.calibration.fit import Fit
from hexmesh.calibration.work import Work, work_of

__all__ = ["Factors", "Fit", "Work", "applied", "work_of"]
