"""`orcaserve bench paper`: the experiments of Orca's paper, and of what came after it, on one model and one machine.

Floor 2, like the rest of `bench`: it drives the engine's own scheduler and loop, and is handed whoever runs a batch.
"""

# The parts of the report, in order.
PARTS = ("alone", "mixed", "equal", "variance", "ladder", "memory")
