"""The networks of ``dp_step.py`` in PyTorch with Opacus and in JAX, where these are installed."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

THREADS = 2
CLIP, NOISE, RATE = 1.0, 1.3, 0.01
#: Program -> what it needs.
NEEDS = {"torch none": ["torch"], "opacus": ["torch", "opacus"], "jax none": ["jax"], "jax vmap": ["jax"]}


def installed() -> list[str]:
    """The programs that can run here."""
    return [name for name, modules in NEEDS.items() if all(importlib.util.find_spec(m) for m in modules)]


def step_of(program: str, network: str, x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    """A function that takes one training step.

    Args:
      program: One of ``NEEDS``.
      network: "cnn" or "dense".
      x: ``[batch, 28, 28, 1]``.
      y: ``[batch]``, 0 to 9.
    """
    make = _torch if NEEDS[program][0] == "torch" else _jax
    return make(program in ("opacus", "jax vmap"), network, x, y)


def _torch(private: bool, network: str, x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    import torch
    from torch import nn

    torch.set_num_threads(THREADS)
    if network == "cnn":
        images = torch.tensor(x.transpose(0, 3, 1, 2).copy())
        net: Any = nn.Sequential(
            nn.ZeroPad2d((3, 3, 3, 3)),
            nn.Conv2d(1, 16, 8, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
    else:
        images = torch.tensor(x[:, :, :14].reshape(len(x), -1))
        layers = (nn.Linear(28 * 14, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        net = nn.Sequential(*layers)
    labels = torch.tensor(y, dtype=torch.int64)
    if private:
        import opacus

        net = opacus.GradSampleModule(net)
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=RATE)
    if private:
        optimizer = opacus.optimizers.DPOptimizer(
            optimizer, noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=len(x)
        )
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(net(images), labels).backward()
        optimizer.step()

    return step


def _jax(private: bool, network: str, x: np.ndarray, y: np.ndarray) -> Callable[[], Any]:
    import jax
    from jax import lax
    from jax import numpy as jnp

    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape, scale=np.prod(shape[:-1]) ** -0.5).astype(np.float32))

    def conv(h: Any, kernel: Any, padding: str) -> Any:
        return lax.conv_general_dilated(h, kernel, (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def pool(h: Any) -> Any:
        return lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID")

    if network == "cnn":
        kernels, sizes = [weights(8, 8, 1, 16), weights(4, 4, 16, 32)], [4 * 4 * 32, 32, 10]
    else:
        kernels, sizes = [], [28 * 14, 128, 128, 10]
    dense = [weights(*pair) for pair in itertools.pairwise(sizes)]
    biases = [jnp.zeros(w.shape[-1]) for w in [*kernels, *dense]]

    def losses(held: Any, images: Any, labels: Any) -> Any:
        kernels, dense, biases = held
        h = images if kernels else images[:, :, :14]
        for kernel, bias, padding in zip(kernels, biases, ("SAME", "VALID")):
            h = pool(jax.nn.relu(conv(h, kernel, padding) + bias))
        h = h.reshape(h.shape[0], -1)
        for number, (kernel, bias) in enumerate(zip(dense, biases[len(kernels) :])):
            h = h @ kernel + bias
            h = jax.nn.relu(h) if number < len(dense) - 1 else h
        return -jax.nn.log_softmax(h)[jnp.arange(h.shape[0]), labels]

    def plain(held: Any, key: Any, images: Any, labels: Any) -> Any:
        grads = jax.grad(lambda h: losses(h, images, labels).mean())(held)
        return jax.tree.map(lambda w, g: w - RATE * g, held, grads)

    def noised(held: Any, key: Any, images: Any, labels: Any) -> Any:
        def of_one(image: Any, label: Any) -> Any:
            grads = jax.grad(lambda h: losses(h, image[None], label[None])[0])(held)
            norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
            return jax.tree.map(lambda g: g / jnp.maximum(1.0, norm / CLIP), grads)

        sums = jax.tree.map(lambda g: g.sum(0), jax.vmap(of_one)(images, labels))
        leaves, tree = jax.tree.flatten(sums)
        keys = jax.random.split(key, len(leaves))
        leaves = [g + CLIP * NOISE * jax.random.normal(k, g.shape) for g, k in zip(leaves, keys)]
        sums = jax.tree.unflatten(tree, leaves)
        return jax.tree.map(lambda w, g: w - RATE * g / images.shape[0], held, sums)

    update = jax.jit(noised if private else plain)
    state = {"held": (kernels, dense, biases), "key": jax.random.key(0)}
    images, labels = jnp.asarray(x), jnp.asarray(y)

    def step() -> None:
        state["key"], key = jax.random.split(state["key"])
        state["held"] = jax.block_until_ready(update(state["held"], key, images, labels))

    return step
