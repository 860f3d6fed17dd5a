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


def can_extract(image: tf.Tensor) -> bool:
    """Whether ``extract`` has what it needs: the image's size."""
    return None not in image.shape.as_list()[1:]


def extract(image: tf.Tensor, window: Window) -> tf.Tensor:
    """``[rows, P, offsets * channels]`` of an image that ``can_extract`` takes, ``[rows, spatial…, channels]``.

    The columns are ordered as a kernel is: spatial offsets, then channels.
    """
    if window.channels == 1:
        image = tf.transpose(image, [0, *range(2, image.shape.rank), 1])
    spatial, channels = image.shape.as_list()[1:-1], image.shape.as_list()[-1]
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


def by_columns(image: tf.Tensor, window: Window) -> tuple[tf.Tensor, np.ndarray] | None:
    """The same, of an image with few channels and strides, as ``[rows, offsets * channels, P]`` in another order.

    An image is cut into its phases by the strides; then what an offset sees at all positions of a row lies side by
    side, and is copied as a whole. Where there are few channels that is faster than any way of making rows of patches.

    Returns:
      (columns, where in them the column of each offset and channel is), or None where this is not the fastest.
    """
    spatial, channels = image.shape.as_list()[1:-1], image.shape.as_list()[-1]
    wanted = len(window.sizes) == 2 and window.channels == 3 and window.dilations == (1, 1)
    if not wanted or None in spatial or channels is None or channels >= _FEW_CHANNELS or max(window.strides) == 1:
        return None
    pads = window.pads or tuple(_same(n, k, s) for n, k, s in zip(spatial, window.sizes, window.strides))
    (kh, kw), (sh, sw) = window.sizes, window.strides
    out = [(n + sum(p) - k) // s + 1 for n, k, s, p in zip(spatial, window.sizes, window.strides, pads)]
    blocks = [o + -(-k // s) - 1 for o, k, s in zip(out, window.sizes, window.strides)]  # of each phase
    more = [b * s - n - p[0] for b, s, n, p in zip(blocks, window.strides, spatial, pads)]
    if min(more) < 0:
        image = image[:, : spatial[0] + min(more[0], 0), : spatial[1] + min(more[1], 0)]
    ends = [[p[0], max(m, 0)] for p, m in zip(pads, more)]
    image = tf.pad(image, [[0, 0], *ends, [0, 0]])
    phases = tf.reshape(image, [-1, blocks[0], sh, blocks[1], sw, channels])
    phases = tf.transpose(phases, [0, 2, 4, 5, 1, 3])  # [rows, phase, phase, channel, block, block]
    across = -(-kw // sw)
    shifted = tf.stack([phases[..., shift : shift + out[1]] for shift in range(across)], 1)
    lines = tf.reshape(shifted, [-1, across * sh * sw * channels * blocks[0], out[1]])
    order = [(u, v, c) for u in range(kh) for v in range(kw) for c in range(channels)]
    # Offsets that lie in one phase one after the other: their lines lie one after the other, too.
    order.sort(key=lambda place: (place[0] // sh, place[1] // sw, place[0] % sh, place[1] % sw, place[2]))
    starts = [((((v // sw) * sh + u % sh) * sw + v % sw) * channels + c) * blocks[0] + u // sh for u, v, c in order]
    places = (np.asarray(starts)[:, np.newaxis] + np.arange(out[0])).reshape(-1).astype(np.int32)
    taken = tf.reshape(tf.gather(lines, places, axis=1), [-1, len(order), out[0] * out[1]])
    column = {place: number for number, place in enumerate(order)}
    kernel_order = [column[u, v, c] for u in range(kh) for v in range(kw) for c in range(channels)]
    return taken, np.asarray(kernel_order, np.int32)


def _same(size: int, window: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def positions_last(made: tf.Tensor, window: Window) -> tf.Tensor:
    """``[rows, P, channels]`` of what a convolution made, its positions in the order of ``extract``."""
    if window.channels == 1:
        made = tf.transpose(made, [0, *range(2, made.shape.rank), 1])
    channels = made.shape[-1]
    return tf.reshape(made, [-1, int(np.prod(made.shape.as_list()[1:-1])), channels])
