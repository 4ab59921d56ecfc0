"""Contours of a loss with the trajectories of optimizers: `landscape` compares, `trajectory` makes one of them."""

from schuss.lab.landscape.compare import landscape as landscape
from schuss.lab.landscape.network import Plane as Plane
from schuss.lab.landscape.result import Landscape as Landscape
from schuss.lab.landscape.surface import SURFACES as SURFACES
from schuss.lab.landscape.surface import Surface as Surface
from schuss.lab.landscape.trajectory import Trajectory as Trajectory
from schuss.lab.landscape.trajectory import trajectory as trajectory
