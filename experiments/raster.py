"""The rival in Table 1 and Table 3: next-token prediction (1), in raster order.

A raster-scan transformer is a VAR whose "scales" are single tokens: its block-causal mask is then the
causal mask, and its cached generation takes one forward pass a token. So the rival has the same width,
depth and code; what differs is what stands here.
"""
import torch


class Raster:
    """What VAR asks of a tokenizer, for n * n tokens of a tokenizer with one scale (n,)."""
    def __init__(self, vae):
        self.vae, self.quantize, self.embedding = vae, self, vae.quantize.embedding
        self.sides = (1,) * vae.patch_nums[-1] ** 2             # patch_nums of the transformer

    def var_input(self, tokens):
        """n * n tokens (B, 1) -> the embeddings of all but the last, (B, n * n - 1, z)."""
        return self.embedding(torch.cat(list(tokens), dim=1)[:, :-1])

    def add_scale(self, so_far, k, z_k):
        """What was drawn and one more: (B, k + 1, z)."""
        return torch.cat([so_far, z_k], dim=1) if k else z_k

    def shrink(self, so_far, k):
        """The transformer's next input: the embedding drawn last, (B, 1, z)."""
        return so_far[:, -1:]

    def picture(self, drawn):
        """Embeddings (B, n * n, z) -> images (B, 3, H, W)."""
        return self.vae.picture(self.vae.quantize.add_scale(0, len(self.vae.patch_nums) - 1, drawn))
