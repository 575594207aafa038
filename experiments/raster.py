"""Raster-scan AR, the baseline of Table 1 and Table 3: next-token prediction, equation (1).

    from raster import Raster           # used by ablation.py and bench.py; not a command

A raster-scan transformer is a VAR whose "scales" are single tokens: its block-causal mask is then
the causal mask, and its generation with cached keys and values takes one pass per token. Width,
depth and code are therefore those of VAR. This file holds what differs: how tokens become the
transformer's input, and an image. It writes nothing.

Letters as in tokenizer.py; n is the side of the token map, so that there are n * n tokens.
"""
import torch


class Raster:
    """What VAR needs of a tokenizer, made from a VQVAE with the single scale (n,)."""

    def __init__(self, vae):
        self.vae = vae
        self.embedding = vae.quantize.embedding
        self.quantize = self                            # VAR calls vae.quantize.add_scale, .shrink
        self.patch_nums = (1,) * vae.patch_nums[-1] ** 2        # those of the transformer

    def var_input(self, tokens):
        """n * n tokens, (B, 1) each -> the embeddings of all but the last: (B, n * n - 1, z)."""
        row = torch.cat(list(tokens), dim=1)                                # (B, n * n)
        return self.embedding(row[:, :-1])

    def add_scale(self, previous, k, z_k):
        """The embeddings so far and one more: (B, k, z) and (B, 1, z) -> (B, k + 1, z)."""
        if k == 0:
            return z_k
        return torch.cat([previous, z_k], dim=1)

    def shrink(self, embeddings, k):
        """The transformer's next input is the embedding that was drawn last: (B, 1, z)."""
        return embeddings[:, -1:]

    def to_image(self, embeddings):
        """The embeddings of all tokens (B, n * n, z) -> images (B, 3, H, W)."""
        f_hat = self.vae.quantize.add_scale(0, 0, embeddings)               # (B, z, n, n)
        return self.vae.to_image(f_hat)
