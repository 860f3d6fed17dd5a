"""What a convolution sees at each of its positions, as rows of a matrix (im2col)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tensorflow.compat.v1 as tf

# Measured on CPUs: for few channels a convolution with an identity as its kernel is fastest, else a gather of places.
_FEW_CHANNELS, _SMALL_WINDOW = 8, 256


@dataclass(frozen=True)
class Window:
    """How a convolution looks at an image; one entry for each spatial axis.

    Attributes:
      sizes: Of the kernel.
      strides: Between positions.
      dilations: Between the places of a window.
      pads: (before, after), or None for what ``SAME`` gives.
      channels: The axis of the image's channels.
      padding: As TensorFlow calls it.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | None
    channels: int
    padding: str


def of_convolution(op: tf.Operation, kernel: tf.Tensor) -> Window | None:
    """The window of a convolution op; None where a size is not known."""
    spatial = kernel.shape.rank - 2
    sizes = kernel.shape.as_list()[:spatial]
    if None in kernel.shape.as_list():
        return None
    has = {attr.name for attr in op.op_def.attr}
    first = op.get_attr("data_format").startswith(b"NC")
    axes = slice(2, 2 + spatial) if first else slice(1, 1 + spatial)
    strides = tuple(op.get_attr("strides")[axes])
    dilations = tuple(op.get_attr("dilations")[axes]) if "dilations" in has else (1,) * spatial
    padding = op.get_attr("padding").decode()
    pads: tuple[tuple[int, int], ...] | None = None
    if padding == "VALID":
        pads = ((0, 0),) * spatial
    elif padding == "EXPLICIT":
        flat = op.get_attr("explicit_paddings")
        pads = tuple(zip(flat[::2], flat[1::2]))[axes]
    return Window(tuple(sizes), strides, dilations, pads, 1 if first else spatial + 1, padding)


def extract(image: tf.Tensor, window: Window) -> tf.Tensor | None:
    """``[rows, P, offsets * channels]`` of ``[rows, spatial…, channels]``; None where the image's size is not known.

    The columns are ordered as a kernel is: spatial offsets, then channels.
    """
    if window.channels == 1:
        image = tf.transpose(image, [0, *range(2, image.shape.rank), 1])
    spatial, channels = image.shape.as_list()[1:-1], image.shape.as_list()[-1]
    if None in spatial or channels is None:
        return None
    offsets = int(np.prod(window.sizes))
    columns = offsets * channels
    sizes = [(size - 1) * rate + 1 for size, rate in zip(window.sizes, window.dilations)]
    pads = window.pads or tuple(_same(n, k, s) for n, k, s in zip(spatial, sizes, window.strides))
    padded = [n + before + after for n, (before, after) in zip(spatial, pads)]
    out = [(n - k) // s + 1 for n, k, s in zip(padded, sizes, window.strides)]
    positions = int(np.prod(out))
    if image.dtype == tf.float32 and len(spatial) == 2 and channels < _FEW_CHANNELS and columns <= _SMALL_WINDOW:
        kernel = np.eye(columns, dtype=np.float32).reshape(*window.sizes, channels, columns)
        explicit = [[0, 0], *map(list, pads), [0, 0]]
        taken = tf.nn.conv2d(
            image, kernel, strides=[1, *window.strides, 1], padding=explicit, dilations=[1, *window.dilations, 1]
        )
        return tf.reshape(taken, [-1, positions, columns])
    if any(before or after for before, after in pads):
        image = tf.pad(image, [[0, 0], *map(list, pads), [0, 0]])
    places = np.zeros([positions, offsets], np.int64)
    grids = [
        (np.arange(n)[:, None] * s + np.arange(k)[None, :] * rate)
        for n, k, s, rate in zip(out, window.sizes, window.strides, window.dilations)
    ]
    for axis, grid in enumerate(grids):
        shape = [1] * (2 * len(grids))
        shape[axis], shape[len(grids) + axis] = grid.shape
        full = np.broadcast_to(grid.reshape(shape), [*out, *window.sizes]).reshape(positions, offsets)
        places = places * padded[axis] + full
    flat = tf.reshape(image, [-1, int(np.prod(padded)), channels])
    taken = tf.gather(flat, places.reshape(-1).astype(np.int32), axis=1)
    return tf.reshape(taken, [-1, positions, columns])


def _same(size: int, window: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def positions_last(made: tf.Tensor, window: Window) -> tf.Tensor:
    """``[rows, P, channels]`` of what a convolution made, its positions in the order of ``extract``."""
    if window.channels == 1:
        made = tf.transpose(made, [0, *range(2, made.shape.rank), 1])
    channels = made.shape[-1]
    return tf.reshape(made, [-1, int(np.prod(made.shape.as_list()[1:-1])), channels])
