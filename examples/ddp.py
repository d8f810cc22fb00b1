"""scikit-learn's digits under DistributedDataParallel: every rank has a guard, and they halt together.

``--ill``: one sample of rank 1's share holds a NaN. DDP averages gradients, so that both ranks are poisoned in the same step;
both halt at the same step, and both name rank 1. gloo on a CPU, NCCL on GPUs.

pip install lossguard scikit-learn
torchrun --standalone --nproc-per-node 2 examples/ddp.py
torchrun --standalone --nproc-per-node 2 examples/ddp.py --ill
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lossguard import Guard, TrainingHalted


def main(ill: bool) -> int:
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)
    if ill and rank == 1:
        x[900, 13] = float("nan")
    data = TensorDataset(x, y)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    code = 0
    with Guard(model, optimizer) as guard:  # after init_process_group and wrapping
        try:
            for epoch in range(5):
                sampler.set_epoch(epoch)
                for inputs, targets in guard.batches(loader):
                    loss = F.cross_entropy(model(inputs.to(device)), targets.to(device))
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    guard.step(loss)
        except TrainingHalted as halt:
            code = halt.exit_code
            print(f"rank {rank} halted after {guard.steps} steps\n{halt}")
    if code == 0:
        print(f"rank {rank}: loss {loss.item():.3f} after {guard.steps} steps", *(guard.findings or ["no findings"]), sep="\n")
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main(ill="--ill" in sys.argv[1:]))
