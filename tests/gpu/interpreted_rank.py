"""A worker process as the engine starts it, whose GPU is this CPU, with Triton's interpreter."""

import os
import sys

import interpreted
import torch

from orcaserve.executors import rank, worker_process

rank._device_of = lambda begin: torch.device("cpu")
with interpreted.quick(), interpreted.like_a_gpu():
    code = worker_process.main(int(sys.argv[1]), int(sys.argv[2]), [int(fd) for fd in sys.argv[3:]])
os._exit(code)
