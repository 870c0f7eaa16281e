"""Makes the files beside it, with PyTorch: `python tests/data/weights/make.py` (made with torch 2.13.0 on Python 3.11).

`net.pt` and `legacy.pt` hold the same small network, as `torch.save` writes it now and wrote it before 1.6; `net.npz` an input
and what the network gives, before and after a step in training mode that moves its statistics. `dtypes.pt` holds tensors of
many kinds. `module.pt` is a pickled module, which no reader may touch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6, momentum=0.3)
        self.up = nn.ConvTranspose2d(6, 5, 3, stride=2)
        self.embed = nn.Embedding(7, 5)
        self.line = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        x = self.up(torch.relu(self.norm(self.conv(x)))).mean((2, 3))
        return self.head(self.line(x + self.embed(words)))


def main() -> None:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, words = torch.randn(2, 4, 6, 6), torch.tensor([3, 6])
    torch.save(net.state_dict(), HERE / "net.pt")
    torch.save(net.state_dict(), HERE / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(nn.Linear(2, 2), HERE / "module.pt")
    results = {
        "x": x.permute(0, 2, 3, 1),
        "words": words,
        "evaluated": net.eval()(x, words),
        "trained": net.train()(x, words),
    }
    results |= {"mean": net.norm.running_mean, "var": net.norm.running_var}
    np.savez(HERE / "net.npz", **{name: value.detach().numpy() for name, value in results.items()})

    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "turned": base.T[1:, ::2],
        "shared": base[2],
        "parameter": nn.Parameter(torch.ones(2)),
        "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "float16": torch.tensor([0.5], dtype=torch.float16),
        "int64": torch.tensor(2**40),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    torch.save({"epoch": 3, "state_dict": tensors, "history": [torch.ones(1), 0.5], "name": "net"}, HERE / "dtypes.pt")


if __name__ == "__main__":
    main()
