"""The last block of a vision transformer whose embedding is its class token: what becomes of that token alone.

The other tokens serve as keys and values there. Of the 12·D² multiplications a token (query, key, value, projection and
both layers of the MLP, arXiv 2010.11929) 2·D² are left in this block: a fourteenth of the work of ViT-S, forward and
backward, is not done, for the same embedding and the same gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def class_token_block(block: Any, tokens: Tensor) -> Tensor:
    """Do what timm's `Block` does, for the first token: (B, N, D) → (B, 1, D).

    Args:
        block: timm.models.vision_transformer.Block.
        tokens: (B, N, D), the class token first.
    """
    token = tokens[:, :1] + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(tokens))))
    answer: Tensor = token + block.drop_path2(block.ls2(block.mlp(block.norm2(token))))
    return answer


def _attend(attention: Any, tokens: Tensor) -> Tensor:
    """The first token's attention to all, as in timm's `Attention`."""
    batch, heads, width = len(tokens), attention.num_heads, attention.num_heads * attention.head_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
    q = F.linear(tokens[:, :1], weight[:width], first).view(batch, 1, heads, -1).transpose(1, 2)
    both = F.linear(tokens, weight[width:], rest).view(batch, -1, 2, heads, attention.head_dim)
    k, v = both.permute(2, 0, 3, 1, 4)
    dropout = attention.attn_drop.p if attention.training else 0.0
    seen = F.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v, dropout_p=dropout)
    answer: Tensor = attention.proj_drop(attention.proj(attention.norm(seen.transpose(1, 2).flatten(2))))
    return answer


@torch.no_grad()
def class_token_attention(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """Where the class token of a ViT looks in its last block (arXiv 2104.14294, figure 1).

    Args:
        backbone: In eval mode; any timm model.
        images: (B, C, H, W) standardized.

    Returns:
        (B, heads, h, w), the weights that each head gives to the patches; the rest of their sum, up to 1, goes to the
        class token and to registers. None of a backbone without class token, or whose attention is not timm's plain
        one.
    """
    model: Any = backbone
    blocks: Any = getattr(model, "blocks", None)
    attention: Any = getattr(blocks[-1], "attn", None) if isinstance(blocks, nn.Sequential) else None
    plain = all(hasattr(attention, name) for name in ("qkv", "q_norm", "k_norm", "num_heads", "head_dim"))
    if getattr(model, "cls_token", None) is None or not plain or hasattr(model, "rope"):
        return None
    taken: list[Tensor] = []  # of the norm before the attention, which the whole block and the class token's both call
    hook = blocks[-1].norm1.register_forward_hook(lambda module, args, output: taken.append(output))
    try:
        model(images)
    finally:
        hook.remove()
    tokens = taken[0]
    qkv = attention.qkv(tokens).view(*tokens.shape[:2], 3, attention.num_heads, attention.head_dim)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
    weights = (q @ k.transpose(-2, -1) * attention.head_dim**-0.5).softmax(dim=-1)[:, :, 0, model.num_prefix_tokens :]
    grid = [side // patch for side, patch in zip(images.shape[-2:], model.patch_embed.patch_size, strict=True)]
    maps: Tensor = weights.unflatten(-1, grid)
    return maps
