"""Raster-scan AR, the baseline of Table 1 and Table 3: next-token prediction, equation (1).

A raster-scan transformer is a VAR whose "scales" are single tokens: its block-causal mask is then
the causal mask, and its generation with cached keys and values takes one pass per token. Width,
depth and blocks are therefore those of VAR. This file, which reasons.py and bench.py use, holds
what differs: how tokens become the transformer's input, and an image.

Letters as in tokenizer.py; n is the side of the token map, so that there are n * n tokens.
"""
import torch
import torch.nn as nn


class Raster(nn.Module):
    """What VAR needs of a tokenizer, made from a VQVAE with the single scale (n,)."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.embedding = vae, vae.quantize.embedding
        self.image_size = vae.image_size
        self.patch_nums = (1,) * vae.patch_nums[-1] ** 2        # those of the transformer

    @property
    def quantize(self):
        """VAR calls vae.quantize.empty, .add_scale and .shrink."""
        return self

    def var_input(self, maps):
        """n * n tokens, (B, 1) each -> the embeddings of all but the last: (B, n * n - 1, z)."""
        row = torch.cat(list(maps), dim=1)                                  # (B, n * n)
        return self.embedding(row[:, :-1])

    def empty(self, B):
        """No embeddings yet: (B, 0, z)."""
        codes = self.embedding.weight
        return codes.new_zeros(B, 0, codes.shape[1])

    def add_scale(self, previous, k, r_k):
        """The embeddings so far and that of one more token: (B, k, z), (B, 1) -> (B, k + 1, z)."""
        return torch.cat([previous, self.embedding(r_k)], dim=1)

    def shrink(self, embeddings, k):
        """The transformer's next input is the embedding that was drawn last: (B, 1, z)."""
        return embeddings[:, -1:]

    def decode(self, maps):
        """n * n tokens, (B, 1) each -> images (B, 3, H, W) in [-1, 1]."""
        return self.vae.decode([torch.cat(maps, dim=1)])
