"""What servers are given to do: requests with their arrivals, prompts and lengths, pure functions of a text and a seed.

`compared` has the works of `bench compare`, `spec` those of `bench serve`.
"""

from orcaserve.bench.workloads.compared import make, names
from orcaserve.bench.workloads.work import LOWEST_ID, Item, Kind, Work, load, save

__all__ = ["LOWEST_ID", "Item", "Kind", "Work", "load", "make", "names", "save"]
