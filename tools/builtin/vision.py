"""The vision tower: patches, rotary attention in two dimensions, two downsamplers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.builtin.preprocess import MEAN, STD
from tools.builtin.shape import VisionShape


def _affine(module: nn.LayerNorm, x: Tensor) -> Tensor:
    wide = functional.layer_norm(x.float(), x.shape[-1:], module.weight.float(), module.bias.float(), 1e-5)
    return wide.to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def grid_rope(grid: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin [grid², head_dim / 2]: columns turn the first half of the pairs, rows the second."""
    quarter = head_dim // 4
    frequency = 10_000.0 ** (-2.0 * torch.arange(quarter, device=device) / (head_dim // 2))
    index = torch.arange(grid * grid, device=device)
    column = (index % grid)[:, None] * frequency
    row = (index // grid)[:, None] * frequency
    angle = torch.cat((column, row), dim=-1)
    return angle.cos(), angle.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring dimensions (2m, 2m + 1) by angle m. Shapes: x [N, heads, P, D]."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class PackedAttention(nn.Module):
    """Attention whose q, k and v share one matrix."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Let all patches of one picture see each other."""
        packed = _linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin), v)
        return _linear(mixed.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias)


class Scale(nn.Module):
    """Layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))


class Feed(nn.Module):
    """Two matrices around quick GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        h = _linear(x, self.c_fc.weight, self.c_fc.bias)
        return _linear(h * torch.sigmoid(1.702 * h), self.c_proj.weight, self.c_proj.bias)


class VisionBlock(nn.Module):
    """One layer of the tower."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.ls_1, self.ls_2 = Scale(shape.width), Scale(shape.width)
        self.attn = PackedAttention(shape.width, shape.heads)
        self.mlp = Feed(shape.width, int(shape.width * shape.mlp_ratio))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        x = x + self.ls_1.gamma.to(x.dtype) * self.attn(_affine(self.ln_1, x), cos, sin)
        out: Tensor = x + self.ls_2.gamma.to(x.dtype) * self.mlp(_affine(self.ln_2, x))
        return out


class Stack(nn.Module):
    """The blocks, under the name that the checkpoint gives them."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(shape) for _ in range(shape.layers))


class Tower(nn.Module):
    """From bytes [N, S, S, 3] to features [N, (S/56)², 4 · width]."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.shape = shape
        width, grid = shape.width, shape.image // shape.patch
        self.conv1 = nn.Conv2d(3, width, shape.patch, shape.patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid, width) * 0.02)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Stack(shape)
        self.vit_downsampler1 = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.vit_downsampler2 = nn.Conv2d(2 * width, 4 * width, 3, 2, 1)

    def embed(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return normed patch embeddings [N, grid², width] with their positions added."""
        side, patch = pixels.shape[1], self.shape.patch
        grid = side // patch
        mean = torch.tensor(MEAN, device=pixels.device)
        deviation = torch.tensor(STD, device=pixels.device)
        values = ((pixels.float() / 255 - mean) / deviation).to(dtype)
        values = values.unflatten(2, (grid, patch)).unflatten(1, (grid, patch))
        patches = values.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
        x = functional.linear(patches, self.conv1.weight.flatten(1).to(dtype))
        table: Tensor = self.positional_embedding
        whole = self.shape.image // patch
        if grid != whole:
            image = table.T.unflatten(1, (whole, whole))[None]
            image = functional.interpolate(image, (grid, grid), mode="bilinear", align_corners=False)
            table = image[0].flatten(1).T
        return _affine(self.ln_pre, x + table.to(dtype))

    def forward(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Run the tower on pictures of one size."""
        x = self.embed(pixels, dtype)
        grid = pixels.shape[1] // self.shape.patch
        cos, sin = grid_rope(grid, self.shape.width // self.shape.heads, pixels.device)
        for block in self.transformer.resblocks:
            x = block(x, cos, sin)
        x = x.transpose(1, 2).unflatten(-1, (grid, grid))
        for convolution in (self.vit_downsampler1, self.vit_downsampler2):
            assert convolution.bias is not None
            x = functional.conv2d(x, convolution.weight.to(dtype), convolution.bias.to(dtype), 2, 1)
        return x.flatten(2).transpose(1, 2)
