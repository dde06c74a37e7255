"""Prints how many iterations a second the scheduler, the loop and the simulator's executor do on one core.

    python tools/simulator_speed.py --rows 32

Equal requests decode together, so that every iteration has that many rows; the best of a few rounds counts.
"""

from __future__ import annotations

import argparse
import time

from orcaserve.core.policy import POLICIES
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.sim.cost import CostModel, StageCost
from orcaserve.sim.run import Arrival, simulate


def iterations_per_second(rows: int, policy: str) -> float:
    cost = CostModel(stages=(StageCost(fixed=0.01, per_token=0.0001),))
    config = SchedulerConfig(
        policy=POLICIES[policy], max_batch_size=rows, max_batch_tokens=512, num_blocks=100 * rows, block_size=16
    )
    began = time.process_time()
    _, iterations = simulate([Arrival(0.0, 64, 500)] * (2 * rows), config, cost)
    return len(iterations) / (time.process_time() - began)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    for policy in POLICIES:
        best = max(iterations_per_second(arguments.rows, policy) for _ in range(arguments.rounds))
        print(f"{policy:8} {best:8.0f} iterations/s of {arguments.rows} rows")
