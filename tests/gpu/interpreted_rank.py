"""Worker processes as the engine starts them, whose GPU is this CPU, with Triton's interpreter."""

import os
import sys

import interpreted
import msgspec
import torch

from orcaserve.executors import rank, worker_process
from orcaserve.executors.messages import Ends

rank._device_of = lambda begin: torch.device("cpu")
with interpreted.quick(), interpreted.like_a_gpu():
    code = worker_process.main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=list[Ends]))
os._exit(code)
