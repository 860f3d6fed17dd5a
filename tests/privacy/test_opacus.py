"""The same model in Opacus, where PyTorch and Opacus are installed: the same weights after private steps without noise.

Opacus clips with ``min(1, clip / (norm + 1e-6))``: what is compared here agrees to 1e-5.
"""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

import efl

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
opacus = pytest.importorskip("opacus", reason="Opacus is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
ROWS, WORDS, CLASSES, STEPS, RATE = 6, 11, 3, 3, 0.3
_RNG = np.random.default_rng(7)
IMAGES = _RNG.normal(size=(ROWS, 9, 8, 2)).astype(np.float32)
TOKENS = _RNG.integers(0, WORDS, (ROWS, 5))  # some rows read a word twice
LABELS = _RNG.integers(0, CLASSES, ROWS)
# Of TensorFlow's shapes: kernel and bias of a convolution, a table, a layer norm, two dense layers.
SHAPES = {
    "conv/kernel": (3, 3, 2, 4),
    "conv/bias": (4,),
    "table": (WORDS, 6),
    "scale": (6,),
    "shift": (6,),
    "dense/kernel": (5 * 4 * 4 + 6, 5),
    "dense/bias": (5,),
    "out/kernel": (5, CLASSES),
    "out/bias": (CLASSES,),
}
WEIGHTS = {name: _RNG.normal(size=shape).astype(np.float32) * 0.5 for name, shape in SHAPES.items()}


def ours(clip: float) -> dict[str, np.ndarray]:
    tf.reset_default_graph()
    w = {name: tf.get_variable(name, initializer=value) for name, value in WEIGHTS.items()}
    images, tokens, labels = (tf.placeholder(value.dtype, value.shape) for value in (IMAGES, TOKENS, LABELS))
    h = tf.nn.conv2d(images, w["conv/kernel"], [1, 2, 2, 1], [[0, 0], [1, 1], [1, 1], [0, 0]])
    h = tf.reshape(tf.nn.relu(tf.nn.bias_add(h, w["conv/bias"])), [ROWS, 5 * 4 * 4])
    words = tf.nn.embedding_lookup(w["table"], tokens)
    mean, variance = tf.nn.moments(words, [-1], keepdims=True)
    words = (words - mean) * tf.math.rsqrt(variance + 1e-5) * w["scale"] + w["shift"]
    h = tf.concat([h, tf.reduce_mean(words, 1)], 1)
    h = tf.tanh(tf.matmul(h, w["dense/kernel"]) + w["dense/bias"])
    logits = tf.matmul(h, w["out/kernel"]) + w["out/bias"]
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    op = efl.DPGradientDescentGaussianOptimizer(clip, 0.0, learning_rate=RATE).minimize(loss)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for _ in range(STEPS):
            session.run(op, {images: IMAGES, tokens: TOKENS, labels: LABELS})
        return session.run(w)


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.table = torch.nn.Embedding(WORDS, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.dense = torch.nn.Linear(5 * 4 * 4 + 6, 5)
        self.out = torch.nn.Linear(5, CLASSES)

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.conv(images.permute(0, 3, 1, 2).contiguous())).permute(0, 2, 3, 1).reshape(ROWS, -1)
        h = torch.cat([h, self.norm(self.table(tokens)).mean(1)], 1)
        return self.out(torch.tanh(self.dense(h)))

    def by_name(self) -> dict[str, tuple[torch.nn.Parameter, tuple[int, ...]]]:
        """TensorFlow's name -> parameter, and the order of its axes in TensorFlow."""
        return {
            "conv/kernel": (self.conv.weight, (2, 3, 1, 0)),
            "conv/bias": (self.conv.bias, (0,)),
            "table": (self.table.weight, (0, 1)),
            "scale": (self.norm.weight, (0,)),
            "shift": (self.norm.bias, (0,)),
            "dense/kernel": (self.dense.weight, (1, 0)),
            "dense/bias": (self.dense.bias, (0,)),
            "out/kernel": (self.out.weight, (1, 0)),
            "out/bias": (self.out.bias, (0,)),
        }


def theirs(clip: float) -> dict[str, np.ndarray]:
    net = _Net()
    for name, (parameter, axes) in net.by_name().items():
        parameter.data = torch.tensor(WEIGHTS[name].transpose(np.argsort(axes)).copy())
    named = net.by_name()
    wrapped = opacus.GradSampleModule(net)
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=RATE),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=ROWS,
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = wrapped(torch.tensor(IMAGES), torch.tensor(TOKENS))
        torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS)).backward()
        optimizer.step()
    return {name: parameter.detach().numpy().transpose(axes) for name, (parameter, axes) in named.items()}


@pytest.mark.parametrize("clip", [0.1, 2.0])
def test_without_noise_it_is_opacus(clip: float) -> None:
    one, other = ours(clip), theirs(clip)
    for name in SHAPES:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=2e-6, err_msg=name)
        assert np.abs(one[name] - WEIGHTS[name]).max() > 1e-4, name  # each was trained
    unclipped = ours(1e6)
    assert not np.allclose(unclipped["out/bias"], one["out/bias"], rtol=1e-2)
