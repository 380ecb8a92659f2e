"""For tests of applications that use coordlib: a whole cluster in one thread, in virtual time, from one seed."""

from coordlib.testing.simulation.application import (
    Application,
    Simulation,
    SimulationFailed,
    Summary,
    simulate,
)
from coordlib.testing.simulation.fault_kinds import FAULT_KINDS
from coordlib.testing.simulation.standard import NotSimulated

__all__ = [
    "FAULT_KINDS",
    "Application",
    "NotSimulated",
    "Simulation",
    "SimulationFailed",
    "Summary",
    "simulate",
]
