"""Hamiltonian Monte Carlo over the parameters of a model: a transaction makes each proposal in place, or rolls it back.

    make example NAME=hmc

The model is a Bayesian linear regression, whose posterior is known. A transaction is around each proposal. A rejected proposal is
rolled back without its random streams, because else the next proposal would be the same. The program prints the rate of
acceptance, and the mean and deviation of the samples beside those of the posterior.

Source: Neal, MCMC using Hamiltonian dynamics, 2011, https://arxiv.org/abs/1206.1901
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import mutatis as mu

NOISE = 0.5  # the standard deviation of the observations; that of the prior is 1


class Regression(mu.Module):
    """Weights, the data, and the random stream of the sampler."""

    def __init__(self, x: jax.Array, y: jax.Array, rngs: mu.Rngs) -> None:
        self.weights = mu.Param(jnp.zeros(x.shape[1]))
        self.x = x
        self.y = y
        self.rngs = rngs

    def energy(self) -> jax.Array:
        """The negative log posterior, up to a constant."""
        residuals = self.y - self.x @ self.weights.value
        return jnp.sum(residuals**2) / (2 * NOISE**2) + jnp.sum(self.weights.value**2) / 2


@mu.jit
def propose(model: Regression) -> jax.Array:
    """Move the model along a trajectory of leapfrog steps; the change of the total energy."""
    step = 0.05
    gradient = mu.grad(Regression.energy)
    momentum = jax.tree.map(lambda p: jax.random.normal(model.rngs(), p.shape), mu.state(model, mu.Param))
    before = model.energy() + kinetic(momentum)

    def leapfrog(_: int, momentum: mu.State) -> mu.State:
        half = jax.tree.map(lambda m, g: m - 0.5 * step * g, momentum, gradient(model))
        mu.update(model, jax.tree.map(lambda p, m: p + step * m, mu.state(model, mu.Param), half))
        return jax.tree.map(lambda m, g: m - 0.5 * step * g, half, gradient(model))

    momentum = mu.fori_loop(0, 10, leapfrog, momentum)
    return model.energy() + kinetic(momentum) - before


def kinetic(momentum: mu.State) -> jax.Array:
    """The energy of a momentum."""
    return sum((jnp.sum(m**2) / 2 for m in jax.tree.leaves(momentum)), jnp.float32(0))


def sample(model: Regression, count: int) -> tuple[np.ndarray, float]:
    """Samples of the weights, and the share of proposals that were accepted."""
    samples, accepted = [], 0
    for _ in range(count):
        with mu.transaction() as proposal:
            change = propose(model)
            if jnp.log(jax.random.uniform(model.rngs())) < -change:
                accepted += 1
            else:
                proposal.rollback(mu.Not(mu.RngState))
        samples.append(np.asarray(model.weights))
    return np.stack(samples), accepted / count


def make() -> Regression:
    """Forty noisy observations of a linear function of three numbers."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (40, 3))
    y = x @ jnp.array([1.0, -2.0, 0.5]) + NOISE * jax.random.normal(keys[1], (40,))
    return Regression(x, y, mu.Rngs(1))


def posterior(model: Regression) -> tuple[np.ndarray, np.ndarray]:
    """The mean and covariance of the posterior, which is a normal distribution."""
    covariance = jnp.linalg.inv(model.x.T @ model.x / NOISE**2 + jnp.eye(3))
    return np.asarray(covariance @ model.x.T @ model.y / NOISE**2), np.asarray(covariance)


def main() -> None:
    """Compare samples with the posterior."""
    model = make()
    samples, accepted = sample(model, 2000)
    mean, covariance = posterior(model)
    print(f"accepted {accepted:.0%}")
    print("mean     ", samples[200:].mean(0).round(3), " exact", mean.round(3))
    print("deviation", samples[200:].std(0).round(3), " exact", np.sqrt(np.diag(covariance)).round(3))


if __name__ == "__main__":
    main()
