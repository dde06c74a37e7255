"""`orcaserve bench gpu`: what one GPU can do, how near the kernels come to it, and the whole engine with them.

Floor 2, like the rest of `bench`: sizes, limits and reports, without torch. `ops.gpu.benchmark` and
`executors.gpu_bench` measure.
"""

# In the order in which they run, so that a run that is cut short has measured what matters most.
SECTIONS = {
    "ceilings": "What the card can do",
    "steps": "One iteration of a whole model",
    "shared": "256 requests at once, the benchmark that others publish",
    "check": "The same tokens as on the CPU",
    "promise": "The promise: the same bits alone and in a crowd",
    "kernels": "Kernel by kernel",
    "paper": "Orca's trace and one idea at a time",
    "peer": "The same requests by transformers' continuous batching",
}
