"""A rank that agrees with the others 200 times; the second one dies half-way, once."""

import os
import signal

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
x = torch.ones(1)
for i in range(200):
    dist.all_reduce(x)
    x /= 2
    if i == 100 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
dist.destroy_process_group()
