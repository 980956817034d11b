"""The image tower of Step-3.7-Flash: pixels of square views to features as wide as the text model.

A view is cut into patches; 47 blocks of full attention within the view see them; two convolutions halve the grid
twice, and a projection brings what is left to the text width. A 728 px view gives 13 x 13 features, a 504 px crop
9 x 9. Views of one size make one batch, whichever images and requests they come from: a view's features do not depend
on its neighbours. Every rank holds the whole tower.

N views, P patches a view, W the tower's width, H the text width.
Source: docs/images.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from srt.configs.plan import ImageConfig
from srt.configs.step3p7 import VisionConfig
from srt.layers.parameter import Cut, Parameter, Parameters, Piece, nested

ROPE_THETA = 10_000.0
QUICK_GELU = 1.702
STRIDE, PADDING = 2, 1
"""Of both convolutions after the blocks; their kernels are 3 x 3."""


class Weight:
    """One tensor that a checkpoint fills."""

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        self.value: Tensor
        self.parameter = Parameter(shape, dtype, self._take)

    def _take(self, tensor: Tensor) -> None:
        self.value = tensor


class Affine:
    """y = x W^T + b."""

    def __init__(self, dtype: torch.dtype, in_features: int, out_features: int) -> None:
        self._weight, self._bias = Weight(dtype, out_features, in_features), Weight(dtype, out_features)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return functional.linear(x, self._weight.value, self._bias.value)

    def cut(self, *names: str) -> Affine:
        """The same matrix, to be filled in equal parts of its outputs, one a name."""
        for weight in (self._weight, self._bias):
            parameter = weight.parameter
            share = parameter.shape[0] // len(names)
            piece_shape = (share, *parameter.shape[1:])
            parameter.pieces = {
                name: Piece(piece_shape, target=(Cut(0, at * share, share),)) for at, name in enumerate(names)
            }
        return self

    def parameters(self) -> Parameters:
        """`weight`, `bias`."""
        return {"weight": self._weight.parameter, "bias": self._bias.parameter}


class LayerNorm:
    """Normalisation to mean 0 and variance 1 with gain and offset."""

    def __init__(self, dtype: torch.dtype, size: int, eps: float) -> None:
        self._weight, self._bias, self._eps = Weight(dtype, size), Weight(dtype, size), eps

    def __call__(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]."""
        return functional.layer_norm(x, x.shape[-1:], self._weight.value, self._bias.value, self._eps)

    def parameters(self) -> Parameters:
        """`weight`, `bias`."""
        return {"weight": self._weight.parameter, "bias": self._bias.parameter}


class Downsampler:
    """A 3 x 3 convolution that halves the grid, rounding up."""

    def __init__(self, dtype: torch.dtype, in_channels: int, out_channels: int) -> None:
        self._weight = Weight(dtype, out_channels, in_channels, 3, 3)
        self._bias = Weight(dtype, out_channels)

    def __call__(self, x: Tensor) -> Tensor:
        """[N, C, G, G] -> [N, 2C, ceil(G / 2), ceil(G / 2)]."""
        return functional.conv2d(x, self._weight.value, self._bias.value, STRIDE, PADDING)

    def parameters(self) -> Parameters:
        """`weight`, `bias`."""
        return {"weight": self._weight.parameter, "bias": self._bias.parameter}


class TowerBlock:
    """x + scale * attention(norm(x)), then x + scale * network(norm(x)), with learned scales per dimension."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype) -> None:
        width = config.width
        self._heads = config.heads
        self._attention_norm = LayerNorm(dtype, width, config.norm_eps)
        self._qkv = Affine(dtype, width, 3 * width).cut("q", "k", "v")
        self._output = Affine(dtype, width, width)
        self._attention_scale = Weight(dtype, width)
        self._network_norm = LayerNorm(dtype, width, config.norm_eps)
        self._up = Affine(dtype, width, config.mlp_width)
        self._down = Affine(dtype, config.mlp_width, width)
        self._network_scale = Weight(dtype, width)

    def __call__(self, x: Tensor, rotation: Tensor) -> Tensor:
        """[N, P, W] -> [N, P, W]; `rotation` is that of `axial_rotation` for the views' grid."""
        x = torch.addcmul(x, self._attention_scale.value, self._attend(self._attention_norm(x), rotation))
        hidden = self._up(self._network_norm(x))
        hidden = hidden.mul_(torch.sigmoid(QUICK_GELU * hidden))
        return torch.addcmul(x, self._network_scale.value, self._down(hidden))

    def _attend(self, x: Tensor, rotation: Tensor) -> Tensor:
        views, patches, width = x.shape
        q, k, v = self._qkv(x).view(views, patches, 3, self._heads, -1).unbind(2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self._output(mixed.transpose(1, 2).reshape(views, patches, width))

    def parameters(self) -> Parameters:
        """`attention_norm.*`, `qkv.*` (pieces q, k, v), `output.*`, `attention_scale`, and those of the network."""
        return (
            nested("attention_norm", self._attention_norm.parameters())
            | nested("qkv", self._qkv.parameters())
            | nested("output", self._output.parameters())
            | {"attention_scale": self._attention_scale.parameter, "network_scale": self._network_scale.parameter}
            | nested("network_norm", self._network_norm.parameters())
            | nested("up", self._up.parameters())
            | nested("down", self._down.parameters())
        )


class VisionTower:
    """Views to features. Position tables and rotations of both view sizes are made once, when weights are there."""

    def __init__(self, config: VisionConfig, images: ImageConfig, text_width: int, dtype: torch.dtype) -> None:
        width = config.width
        self._config, self._dtype = config, dtype
        self._mean, self._std = torch.tensor(images.mean), torch.tensor(images.std)
        self._patches = Weight(dtype, width, 3, config.patch_size, config.patch_size)
        self._positions = Weight(dtype, (config.image_size // config.patch_size) ** 2, width)
        self._first_norm = LayerNorm(dtype, width, config.norm_eps)
        self._blocks = [TowerBlock(config, dtype) for _ in range(config.layers)]
        self._downsamplers = (Downsampler(dtype, width, 2 * width), Downsampler(dtype, 2 * width, 4 * width))
        self._projector = Weight(dtype, text_width, 4 * width)
        self._grids: dict[int, tuple[Tensor, Tensor]] = {}

    def encode(self, views: Tensor) -> Tensor:
        """Features of views, row-major over the grid that is left.

        Shapes: views [N, S, S, 3] uint8, S a multiple of the patch size, on any device -> [N, F, H].
        """
        return self.features(self._normalised(views))

    def features(self, pixels: Tensor) -> Tensor:
        """Features of views whose pixels are normalised: [N, S, S, 3] -> [N, F, H]."""
        views, side = pixels.shape[0], pixels.shape[1]
        grid = side // self._config.patch_size
        positions, rotation = self._grid(grid)
        x = self._first_norm(self._embed(pixels, grid) + positions)
        for block in self._blocks:
            x = block(x, rotation)
        x = x.view(views, grid, grid, -1).permute(0, 3, 1, 2)
        for downsampler in self._downsamplers:
            x = downsampler(x)
        rows = x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])
        return functional.linear(rows, self._projector.value).view(views, -1, self._projector.value.shape[0])

    def parameters(self) -> Parameters:
        """`patches`, `positions`, `first_norm.*`, `blocks.{i}.*`, `downsampler{1,2}.*`, `projector`."""
        named: Parameters = {
            "patches": self._patches.parameter,
            "positions": self._positions.parameter,
            "projector": self._projector.parameter,
        }
        named |= nested("first_norm", self._first_norm.parameters())
        for at, downsampler in enumerate(self._downsamplers, 1):
            named |= nested(f"downsampler{at}", downsampler.parameters())
        for index, block in enumerate(self._blocks):
            named |= nested(f"blocks.{index}", block.parameters())
        return named

    def _normalised(self, views: Tensor) -> Tensor:
        device = self._patches.value.device
        pixels = views.to(device, non_blocking=True).float()
        mean, std = self._mean.to(device), self._std.to(device)
        return pixels.mul_(1 / 255).sub_(mean).div_(std).to(self._dtype)

    def _embed(self, pixels: Tensor, grid: int) -> Tensor:
        """[N, S, S, 3] -> [N, G * G, W]: one product over the pixels of each patch."""
        views, size = pixels.shape[0], self._config.patch_size
        cut = pixels.view(views, grid, size, grid, size, 3).permute(0, 1, 3, 5, 2, 4)
        return functional.linear(cut.reshape(views, grid * grid, -1), self._patches.value.flatten(1))

    def _grid(self, grid: int) -> tuple[Tensor, Tensor]:
        """(position embeddings [G * G, W], rotation [G * G, 1, D / 2]) of a grid."""
        made = self._grids.get(grid)
        if made is None:
            table = self._positions.value
            head_dim = self._config.width // self._config.heads
            made = resized_positions(table, grid), axial_rotation(grid, head_dim).to(table.device)
            self._grids[grid] = made
        return made


def resized_positions(table: Tensor, grid: int) -> Tensor:
    """The position table [S * S, W] for a grid of another size: bilinear, not antialiased -> [G * G, W]."""
    side = round(table.shape[0] ** 0.5)
    if grid == side:
        return table
    square = table.view(1, side, side, -1).permute(0, 3, 1, 2)
    resized = functional.interpolate(square, size=(grid, grid), mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(grid * grid, -1)


def axial_rotation(grid: int, head_dim: int) -> Tensor:
    """e^(i * angle) of the pairs of a head at each place of a grid: [G * G, 1, D / 2] complex64.

    The first half of the pairs turns with the column, the second with the row.
    """
    pairs = head_dim // 4
    frequencies = ROPE_THETA ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
    index = torch.arange(grid, dtype=torch.float32)
    angles = index[:, None] * frequencies
    columns = angles[None, :, :].expand(grid, grid, pairs)
    rows = angles[:, None, :].expand(grid, grid, pairs)
    both = torch.cat((columns, rows), dim=-1).reshape(grid * grid, 1, 2 * pairs)
    return torch.polar(torch.ones_like(both), both)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (2m, 2m + 1) of each head: [N, P, heads, D] -> the same, in float32 and rounded once."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def paired(half_split: Tensor, heads: int) -> Tensor:
    """Rows of q or k from half-split order, in which transformers keeps them, to the order of `rotate`.

    Within a head, rows m and D / 2 + m become rows 2m and 2m + 1. Shapes: [heads * D, ...] -> the same.
    """
    halves = half_split.reshape(heads, 2, -1, *half_split.shape[1:])
    return halves.transpose(1, 2).reshape(half_split.shape)


def pair_heads(heads: int) -> Callable[[Tensor], Tensor]:
    """`paired` for a number of heads."""
    return lambda tensor: paired(tensor, heads)
