"""The layers of the text model, for packed training and for decoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from tools.builtin.shape import FULL, Kind, Shape

Rope = dict[str, tuple[Tensor, Tensor]]
Masks = dict[str, "BlockMask | Tensor"]


def matrix(rows: int, columns: int, *, lead: tuple[int, ...] = (), scale: float = 1.0) -> nn.Parameter:
    """Return a random matrix that keeps the size of its input, times `scale`."""
    return nn.Parameter(torch.randn(*lead, rows, columns) * scale / math.sqrt(columns))


class Norm(nn.Module):
    """RMSNorm with zero-centred gamma; all arithmetic in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class Linear(nn.Module):
    """y = x Wᵀ, the weight cast to the input's type."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = matrix(outputs, inputs, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the matrix."""
        return functional.linear(x, self.weight.to(x.dtype))


def rope_tables(shape: Shape, positions: Tensor) -> Rope:
    """Return cos and sin per layer type. Shapes: positions [B, L]; tables [B, L, 1, R/2] float32."""
    tables: Rope = {}
    for kind in (shape.kind(0), shape.kind(1)):
        size = shape.rotary(kind)
        theta = shape.theta_full if kind == FULL else shape.theta_sliding
        frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        if kind == FULL:
            frequency = _scaled(shape, frequency)
        angle = positions[..., None, None].float() * frequency.float().to(positions.device)
        tables[kind] = (angle.cos(), angle.sin())
    return tables


def _scaled(shape: Shape, frequency: Tensor) -> Tensor:
    wavelength = 2 * math.pi / frequency
    ratio = shape.scaling_original / wavelength
    smooth = (ratio - shape.scaling_low) / (shape.scaling_high - shape.scaling_low)
    # Short waves keep their frequency, long ones are slowed by the factor, between them a blend.
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequency / shape.scaling_factor + smooth * frequency


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first R dimensions of each head, pairing j with j + R/2."""
    cos, sin = table
    half = cos.shape[-1]
    low, high, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


class Attention(nn.Module):
    """Grouped attention with q/k norms, rope by layer type and one gate per head."""

    def __init__(self, shape: Shape, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.heads = shape.heads if kind == FULL else shape.sliding_heads
        self.kv_heads, self.head_dim = shape.kv_heads, shape.head_dim
        self.q_proj = Linear(shape.hidden, self.heads * shape.head_dim)
        self.k_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.v_proj = Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.o_proj = Linear(self.heads * shape.head_dim, shape.hidden, scale=0.3)
        self.g_proj = Linear(shape.hidden, self.heads, scale=0.1)
        self.q_norm = Norm(shape.head_dim, shape.epsilon)
        self.k_norm = Norm(shape.head_dim, shape.epsilon)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v as [B, L, heads, D], normed and rotated."""
        q = self.q_proj(x).unflatten(-1, (self.heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim))
        table = rope[self.kind]
        return rotate(self.q_norm(q), table), rotate(self.k_norm(k), table), v

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Gate each head's output [B, L, heads, D] by the normed input and project it back."""
        gate = torch.sigmoid(self.g_proj(x))
        out: Tensor = self.o_proj((mixed * gate[..., None]).flatten(-2))
        return out

    def forward(self, x: Tensor, rope: Rope, masks: Masks) -> Tensor:
        """Attend within a batch of whole rows."""
        q, k, v = self.project(x, rope)
        mixed = attend(q, k, v, masks[self.kind])
        return self.finish(x, mixed)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | Tensor) -> Tensor:
    """Softmax attention over [B, L, heads, D]; the mask is sparse blocks or booleans [B, 1, Lq, Lk]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(mask, Tensor):
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        found = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(found, Tensor)
        mixed = found
    return mixed.transpose(1, 2)


def gated(a: Tensor, b: Tensor, limit: float) -> Tensor:
    """SwiGLU; with a limit the gate is clamped after silu, above only, and the other branch on both sides."""
    gate = functional.silu(a)
    if limit:
        gate, b = gate.clamp(max=limit), b.clamp(-limit, limit)
    return gate * b


class Mlp(nn.Module):
    """A dense or shared SwiGLU."""

    def __init__(self, shape: Shape, width: int, limit: float) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, width)
        self.up_proj = Linear(shape.hidden, width)
        self.down_proj = Linear(width, shape.hidden, scale=0.3)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """Apply the three matrices."""
        out: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.limit))
        return out


class Router(nn.Module):
    """Scores of the experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = matrix(shape.experts, shape.hidden)


class Stacked(nn.Module):
    """One matrix of all experts, expert first."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Experts(nn.Module):
    """Routed experts. All of them are computed and the unchosen get weight 0: fast while they are small."""

    def __init__(self, shape: Shape, limit: float) -> None:
        super().__init__()
        lead = (shape.experts,)
        self.gate = Router(shape)
        self.register_buffer("router_bias", torch.zeros(shape.experts))
        self.gate_proj = Stacked(matrix(shape.expert_width, shape.hidden, lead=lead))
        self.up_proj = Stacked(matrix(shape.expert_width, shape.hidden, lead=lead))
        self.down_proj = Stacked(matrix(shape.hidden, shape.expert_width, lead=lead, scale=0.3))
        self.chosen, self.factor, self.limit = shape.chosen, shape.factor, limit

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the expert weights [..., E] (0 where not chosen) and the choice as booleans."""
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(functional.linear(x.float(), self.gate.weight.float()))
        bias: Tensor = self.get_buffer("router_bias")
        left = scores.detach() + bias
        taken = torch.zeros_like(left, dtype=torch.bool)
        for _ in range(self.chosen):
            best = left == left.amax(-1, keepdim=True)
            taken = taken | best
            left = left.masked_fill(best, -1e9)
        weight = scores * taken
        return self.factor * weight / weight.sum(-1, keepdim=True), taken

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the routed sum and each expert's share of the choices [E]."""
        weight, taken = self.weights(x)
        count, width, hidden = self.gate_proj.weight.shape
        gate = self.gate_proj.weight.to(x.dtype).reshape(count * width, hidden)
        up = self.up_proj.weight.to(x.dtype).reshape(count * width, hidden)
        down = self.down_proj.weight.to(x.dtype).transpose(0, 1).reshape(hidden, count * width)
        z = gated(functional.linear(x, gate), functional.linear(x, up), self.limit)
        z = (z.unflatten(-1, (count, width)) * weight.to(x.dtype)[..., None]).flatten(-2)
        return functional.linear(z, down), taken.flatten(0, -2).float().mean(0)


class Block(nn.Module):
    """One decoder layer, dense or routed."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = Norm(shape.hidden, shape.epsilon)
        self.post_attention_layernorm = Norm(shape.hidden, shape.epsilon)
        self.self_attn = Attention(shape, shape.kind(layer))
        clamped = shape.clamped(layer)
        self.mlp: Mlp | None = None
        self.moe: Experts | None = None
        self.share_expert: Mlp | None = None
        if shape.routed(layer):
            self.moe = Experts(shape, shape.limit if clamped else 0.0)
            self.share_expert = Mlp(shape, shape.shared_width, shape.shared_limit if clamped else 0.0)
        else:
            self.mlp = Mlp(shape, shape.intermediate, 0.0)

    def feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the residual branch after attention, and the experts' shares."""
        h = self.post_attention_layernorm(x)
        if self.moe is None or self.share_expert is None:
            assert self.mlp is not None
            return self.mlp(h), None
        routed, share = self.moe(h)
        return routed + self.share_expert(h), share

    def forward(self, x: Tensor, rope: Rope, masks: Masks) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream after the layer, and the experts' shares."""
        x = x + self.self_attn(self.input_layernorm(x), rope, masks)
        out, share = self.feed_forward(x)
        return x + out, share
