"""What devices and ways really take by the steps that were run: corrections of the figures that plans are made from."""

from hexmesh.calibration.factors import Factors, applied
from hexmesh.calibration.fit import Fit
from hexmesh.calibration.ways import Trip, WayFit, lengthened
from hexmesh.calibration.work import Work, work_of

__all__ = ["Factors", "Fit", "Trip", "WayFit", "Work", "applied", "lengthened", "work_of"]
