"""scikit-learn's digits under fully_shard (FSDP2): parameters are DTensors, and the guard reads them as those of one whole model.

``--ill``: the optimizer is made before sharding. It keeps the old, whole parameters, and the sharded ones never move; no error
is raised, and the loss hovers where it began. gloo on a CPU, NCCL on GPUs; torch 2.6 or newer.

pip install lossguard scikit-learn
torchrun --standalone --nproc-per-node 2 examples/fsdp2.py
torchrun --standalone --nproc-per-node 2 examples/fsdp2.py --ill
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lossguard import Guard


def main(ill: bool) -> None:
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels))
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)

    blocks = [nn.Sequential(nn.Linear(64, 128), nn.ReLU()), nn.Sequential(nn.Linear(128, 128), nn.ReLU()), nn.Linear(128, 10)]
    model = nn.Sequential(*blocks).to(device)
    if ill:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not ill:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    with Guard(model, optimizer) as guard:  # after sharding
        for epoch in range(5):
            sampler.set_epoch(epoch)
            for inputs, targets in guard.batches(loader):
                loss = F.cross_entropy(model(inputs.to(device)), targets.to(device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                guard.step(loss)
    if rank == 0:
        print(f"a weight of this model: {type(model[0][0].weight).__name__}; loss {loss.item():.3f} after {guard.steps} steps")
        print(*(guard.findings or ["no findings"]), sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(ill="--ill" in sys.argv[1:])
