"""Small nets of embeddings, gates and attention heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import image, sequence


class FusedGLU(nn.Module):
    """Gate and value from one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.gate_value, self.down = nn.Linear(8, 24), nn.Linear(12, 8)
        self.act_value, self.down2 = nn.Linear(8, 20), nn.Linear(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.glu(self.gate_value(self.norm(x))))
        act, value = self.act_value(x).chunk(2, -1)
        return self.head(x + self.down2(F.silu(act) * value))


class TiedDecoder(nn.Module):
    """The embedding is also the output matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Embedding(7, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.decoder = nn.Linear(8, 7, bias=False)
        self.decoder.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.decoder(x + self.fc2(torch.tanh(self.fc1(x))))


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary embedding of [b, h, l, d]: halves are the two coordinates."""
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


class GroupedQuery(nn.Module):
    """Four query heads share two key and value heads; rotary positions; causal mask; SwiGLU; RMS norm."""

    angle: Tensor

    def __init__(self, tokens: int = 5) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 16), nn.Parameter(torch.ones(16))
        self.q, self.k, self.v = (nn.Linear(16, n, bias=False) for n in (16, 8, 8))
        self.o = nn.Linear(16, 16, bias=False)
        self.gate, self.up, self.down = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 16)
        self.head = nn.Linear(16, 9)
        frequencies = torch.arange(tokens)[:, None] * 0.5 ** torch.arange(2)  # [l, d/2]
        self.register_buffer("angle", frequencies.repeat(1, 2), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        h = F.rms_norm(x, (16,), self.norm)
        q = _rotate(self.q(h).unflatten(-1, (4, 4)).transpose(1, 2), self.angle)
        k = _rotate(self.k(h).unflatten(-1, (2, 4)).transpose(1, 2), self.angle)
        v = self.v(h).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class WrappedEncoder(nn.Module):
    """nn.TransformerEncoderLayer between an embedding and a head."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, norm_first=norm_first, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        layer, x = self.layer, self.embed(x)
        if layer.norm_first:
            h = layer.norm1(x)
            x = x + layer.self_attn(h, h, h, need_weights=False)[0]
            return self.head(x + layer.linear2(F.relu(layer.linear1(layer.norm2(x)))))
        x = layer.norm1(x + layer.self_attn(x, x, x)[0])
        return self.head(layer.norm2(x + layer.linear2(F.relu(layer.linear1(x)))))


class VisionTransformer(nn.Module):
    """Patches, class token, positions, packed qkv, LayerScale, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls, self.pos = (
            nn.Conv2d(3, 8, 2, 2),
            nn.Parameter(torch.randn(1, 1, 8)),
            nn.Parameter(torch.randn(1, 10, 8)),
        )
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj, self.fc1, self.fc2 = (
            nn.Linear(8, 24),
            nn.Linear(8, 8),
            nn.Linear(8, 12),
            nn.Linear(12, 8),
        )
        self.scale1, self.scale2 = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.size(0), -1, -1), x], 1) + self.pos
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        a = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
        x = x + self.scale1 * self.proj(a.transpose(1, 2).flatten(2))
        x = x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm3(x)[:, 0])


class Windowed(nn.Module):
    """Shifted windows of 2 x 2 with a relative position bias looked up in a table, as in Swin."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)
        self.merge_norm, self.merge = nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 3)
        self.table = nn.Parameter(torch.randn(9, 2))
        grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(
            1
        )  # [2, 4]
        offset = grid[:, :, None] - grid[:, None] + 1
        self.register_buffer("offset", offset[0] * 3 + offset[1])  # [4, 4]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)  # [b, 4, 4, 8]
        w = self.norm(x).roll((-1, -1), (1, 2)).unflatten(2, (2, 2)).unflatten(1, (2, 2))
        w = w.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # [b windows, 4, 8]
        q, k, v = self.qkv(w).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.offset.flatten()].view(4, 4, 2).permute(2, 0, 1)
        a = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        w = self.proj(a.transpose(1, 2).flatten(2))
        w = w.unflatten(0, (-1, 2, 2)).unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = x + w.roll((1, 1), (1, 2))
        x = torch.cat([x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.merge(self.merge_norm(x)).mean((1, 2)))


class TokenMixer(nn.Module):
    """Tokens mixed by a matrix of their own: its rows are places, the same ones in every model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mixed = self.down(self.up(self.norm(x).transpose(1, 2)).relu()).transpose(1, 2)
        return self.head((x + mixed).mean(1))


class RelativePositions(nn.Module):
    """Attention with `q @ positions`, skewed so that column j of row i is offset j - i."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.positions, self.head = nn.Parameter(torch.randn(9, 4)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)  # [b, 2, 5, 4]
        skewed = F.pad(q @ self.positions.T, (0, 1)).flatten(2)  # [b, 2, 5 * 10]
        offsets = F.pad(skewed, (0, 4)).unflatten(-1, (6, 9))[:, :, :5, 4:]
        a = (q @ k.transpose(-1, -2) + offsets).softmax(-1) @ v
        return self.head((x + self.proj(a.transpose(1, 2).flatten(2))).mean(1))


class Votes(nn.Module):
    """Four units vote for each class: units of one class are alike, classes are the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.votes = nn.Linear(6, 8), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.votes(self.hidden(x).relu()).unflatten(-1, (3, 4)).amax(-1)


class WeightBesideItsModule(nn.Module):
    """A parameter is read by the graph before its module is called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.fc.bias + self.fc(x)).relu())


# name, module, inputs, the op that must be frozen
TOYS = [
    ("fused glu", FusedGLU, sequence, ""),
    ("tied decoder", TiedDecoder, lambda: (torch.randint(7, (2, 5)),), ""),
    ("grouped-query attention", GroupedQuery, lambda: (torch.randint(9, (2, 5)),), ""),
    ("encoder layer, norm first", lambda: WrappedEncoder(True), sequence, ""),
    ("encoder layer, norm last", lambda: WrappedEncoder(False), sequence, ""),
    ("vision transformer", VisionTransformer, image, ""),
    ("token mixer", TokenMixer, sequence, ""),
    ("relative positions", RelativePositions, sequence, ""),
    ("votes for classes", Votes, lambda: (torch.randn(2, 6),), ""),
    ("weight beside its module", WeightBesideItsModule, lambda: (torch.randn(2, 6),), ""),
    ("shifted windows", Windowed, lambda: (torch.randn(2, 3, 4, 4),), ""),
]
