"""Makes `recurrent.npz` beside it, with PyTorch: `python tests/data/weights/make_recurrent.py` (torch 2.13.0, Python 3.11).

Weights of an LSTM, a GRU and an RNN of two layers, the LSTM in both directions, an input, and what each gives for it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3)
    nets = {
        "lstm": nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True),
        "gru": nn.GRU(3, 4, 2, batch_first=True),
        "rnn": nn.RNN(3, 4, batch_first=True),
        "cell": nn.GRUCell(3, 4),
    }
    arrays = {"x": x.numpy()}
    for name, net in nets.items():
        arrays |= {f"{name}.{key}": value.numpy() for key, value in net.state_dict().items()}
        with torch.no_grad():
            out = net(x[:, 0]) if name == "cell" else net(x)[0]
        arrays[f"out.{name}"] = out.numpy()
    np.savez_compressed(Path(__file__).parent / "recurrent.npz", **arrays)


if __name__ == "__main__":
    main()
