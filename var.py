"""VAR: a GPT-2-like transformer that predicts the next scale instead of the next token.

    var = VAR(depth=16)
    maps = vae.encode(images)
    logits, loss = var(labels, vae.var_input(maps), torch.cat(maps, dim=1))     # training
    maps = var.eval().generate(vae, labels)         # sampling: K passes, keys and values cached
    images = vae.decode(maps)

The method (Fig. 4) for the scales 1, 2, 4, 8, with 1 + 4 + 16 + 64 = 85 tokens; read upwards:

    tokens r_k      (B, 1) --+   (B, 4) --+    (B, 16) --+   (B, 64)
                      ^      |     ^      |      ^       |     ^
    logits          (B, 1, V)|   (B, 4, V)|    (B, 16, V)|   (B, 64, V)     head: w -> V
                      ^      |     ^      |      ^       |     ^
    transformer     a column sees itself and all columns to its left        d blocks of width w
                      ^      |     ^      |      ^       |     ^
    input           [s]      |   (B, 4, z)|    (B, 16, z)|   (B, 64, z)     word_embed, positions
                             |     ^      |      ^       |     ^            shrink
    f_hat so far    0        +-> r_0      +->  r_0, r_1  +-> r_0, r_1, r_2  (B, z, 8, 8), add_scale

The row of f_hat names the tokens that are added up in it (Algorithm 2): those of a column go into
the next one's. In training they are those of a real image, and one pass computes all columns. In
sampling they are the model's own, and each column takes a pass, from left to right; f_hat of all
four then goes through the decoder.

Paper (arXiv 2404.02905): Section 3.2, equation (6), Fig. 4; Section 4, equations (7) and (8);
Section 6 for editing. Where paper and release differ, this file follows the release; README.md
lists where. Figures of drawn shapes are those of experiments/reasons.py, of a short training.

Letters: B batch, K scales, p side of the token map of one scale, P that of the last one, l = p * p
tokens of one scale (in training a block gets those of all scales at once), L tokens of all, m of
those in the cache, w width, d depth, h heads, V codes, z code dimension. k is one of the scales,
from 0, where the paper counts from 1.
Parameters have the names of the released files, so that weights load in both directions. Suffixes
like 1LC are shapes, in the release's letters:
    word_embed              z -> w, for the input of all scales but the first
    pos_start               added to the class embedding, which is the input of the first scale
    pos_1LC, lvl_embed      a vector per position, and one per scale, added to every input
    lvl_1L                  the scale of each token
    attn_bias_for_masking   the block-causal mask
    ada_lin                 the AdaLN of a block
    ada_gss                 with shared AdaLN: a block's offset to the shared projection, for its
                            gammas, scales and shifts
    head_nm                 the AdaLN of the head
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from tokenizer import scale_of_token


def block_causal_mask(patch_nums):
    """The attention mask of Fig. 4, (L, L): 0 where token i may see token j, else -inf.

    A token sees all of its own scale and of the scales before it. Its own scale gives no answer
    away, because the inputs there are made of the scales before. (To hide the other tokens of its
    own scale made no difference on drawn shapes.) For scales of 1x1 and 2x2, which have 1 + 4
    tokens, the mask is (x for -inf):
        0 x x x x       the token of the first scale sees itself
        0 0 0 0 0       each of the four tokens of the second scale sees the first scale
        0 0 0 0 0       and all of its own
        0 0 0 0 0
        0 0 0 0 0
    """
    scale = scale_of_token(patch_nums)
    return torch.where(scale[:, None] < scale[None], -torch.inf, 0.)


# ---- The network (Section 4) ----


def layer_norm(x):
    """LayerNorm without parameters of its own: AdaLN brings scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def attend(q, k, v, mask):
    """softmax(q k^T + mask) v for q (B, h, l, 64), k and v (B, h, m, 64), mask (l, m) or None.

    There is no 1 / sqrt(64): the factor is in q. For training on a CPU this is written out, because
    the fused kernel is slower there.
    """
    if mask is not None:
        mask = mask.to(q.dtype)
    if mask is not None and q.device.type == 'cpu' and q.requires_grad:
        return (q @ k.transpose(2, 3) + mask).softmax(-1) @ v               # (B, h, l, 64)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1)


class Attention(nn.Module):
    """Self-attention with queries and keys of unit length (Section 4) and a scale per head."""

    def __init__(self, w, heads):
        super().__init__()
        self.heads = heads
        self.mat_qkv = nn.Linear(w, 3 * w, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(w))
        self.v_bias = nn.Parameter(torch.zeros(w))
        self.register_buffer('zero_k_bias', torch.zeros(w))     # keys have none, as in the release
        self.proj = nn.Linear(w, w)
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))

    def normalise(self, q, k):
        """Queries and keys (B, h, l, 64) of unit length: q.k is a cosine. A learned factor, at most
        100, takes the place of 1 / sqrt(64). It starts at 4, as in the release: cosines are at most
        1, and a softmax of such numbers would attend to everything almost alike."""
        factor = self.scale_mul_1H11.clamp_max(math.log(100)).exp()         # (1, h, 1, 1)
        return F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)

    def forward(self, x, mask, cache=None):
        """x (B, l, w) -> (B, l, w). Training has a mask (l, l), and generation a cache instead.

        cache: keys and values of the m tokens so far, (2, B, h, m, 64): a view of what VAR.generate
        holds. x are the last l of these tokens, and their keys and values are written to it here.
        Each token of x may see all m, so that no mask is needed.
        """
        B, l, w = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias)                        # (B, l, 3w)
        q, k, v = qkv.view(B, l, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, h, l, 64) each
        q, k = self.normalise(q, k)
        q, k = q.to(v.dtype), k.to(v.dtype)             # under autocast, normalize gives float32
        if cache is not None:
            keys, values = cache
            keys[:, :, -l:] = k
            values[:, :, -l:] = v
            k, v = keys, values                                             # (B, h, m, 64) each
        y = attend(q, k, v, mask)                                           # (B, h, l, 64)
        return self.proj(y.transpose(1, 2).reshape(B, l, w))                # (B, l, w)


class Block(nn.Module):
    """Attention and FFN. The class scales and shifts the input of each, and gates its output: AdaLN
    (Section 4). With a plain LayerNorm, 20 points fewer of drawn shapes are classified correctly.
    The gates start almost closed: VAR.init_weights() says why. Otherwise close to GPT-2, without
    rotary embedding, SwiGLU or RMSNorm."""

    def __init__(self, w, heads, drop_rate, shared_aln):
        super().__init__()
        # A buffer, because torch.compile makes one graph per value of a plain number.
        self.register_buffer('drop_rate', torch.tensor(drop_rate), persistent=False)
        self.attn = Attention(w, heads)
        self.ffn = nn.ModuleDict({'fc1': nn.Linear(w, 4 * w), 'fc2': nn.Linear(4 * w, w)})
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, w))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(w, 6 * w))

    def drop_path(self, gamma):
        """Stochastic depth in training: closes the gate gamma (B, 1, w) of a branch for a random
        share of the images, as if the branch were left out, and opens the others wider, so that
        the mean stays the same. Both branches of a block draw on their own."""
        if not self.training:
            return gamma
        kept = torch.rand(len(gamma), 1, 1, device=gamma.device) >= self.drop_rate
        return gamma * (kept / (1 - self.drop_rate))

    def forward(self, x, modulation, mask, cache=None):
        """x (B, l, w), mask and cache as in Attention, modulation: six vectors (B, 1, w), in the
        order of the release."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        y = layer_norm(x) * (1 + scale1) + shift1                           # (B, l, w)
        x = x + self.attn(y, mask, cache) * self.drop_path(gamma1)          # (B, l, w)
        y = layer_norm(x) * (1 + scale2) + shift2                           # (B, l, w)
        y = F.gelu(self.ffn['fc1'](y), approximate='tanh')                  # (B, l, 4w)
        return x + self.ffn['fc2'](y) * self.drop_path(gamma2)              # (B, l, w)


class VAR(nn.Module):
    """The product over all scales k of p(r_k | r_<k), equation (6). patch_nums: sides of the r_k.

    The depth d sets the width w = 64 d and d heads, equation (7). By equation (8) the blocks have
    d (4 w^2 + 8 w^2 + 6 w^2) = 18 d w^2 = 73728 d^3 weights in attention, FFN and AdaLN: 15.9 M for
    d = 6, and 302.0 M for d = 16. It leaves out embeddings, head and biases: with them it is 18.5
    and 310.3 M. Class index num_classes stands for "no class". shared_aln: one AdaLN projection for
    all blocks, as in the 512 px model; (8) is then 12 d w^2 + 6 w^2.
    """
    label_dropout = 0.1     # share of the training images that lose their label, for guidance

    def __init__(self, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), depth=16, num_classes=1000,
                 vocab_size=4096, z_channels=32, shared_aln=False):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.num_classes = num_classes
        self.vocab_size = vocab_size
        w, heads = 64 * depth, depth                                            # (7)
        L = sum(p * p for p in patch_nums)
        self.word_embed = nn.Linear(z_channels, w)
        self.class_emb = nn.Embedding(num_classes + 1, w)
        self.pos_start = nn.Parameter(torch.empty(1, patch_nums[0] ** 2, w))
        self.pos_1LC = nn.Parameter(torch.empty(1, L, w))
        self.lvl_embed = nn.Embedding(len(patch_nums), w)
        self.register_buffer('lvl_1L', scale_of_token(patch_nums)[None])
        self.register_buffer('attn_bias_for_masking', block_causal_mask(patch_nums)[None, None])
        drop_rates = torch.linspace(0, 0.1 * depth / 24, depth).tolist()        # (7)
        self.blocks = nn.ModuleList(Block(w, heads, drop_rate, shared_aln)
                                    for drop_rate in drop_rates)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(w, 6 * w)) if shared_aln else None
        self.head_nm = nn.ModuleDict({'ada_lin': nn.Sequential(nn.SiLU(), nn.Linear(w, 2 * w))})
        self.head = nn.Linear(w, vocab_size)
        self.init_weights(w, depth)

    @torch.no_grad()
    def init_weights(self, w, depth):
        """Initial weights, by parameter name; source: the release."""
        # By a factor this small AdaLN's gates gamma are nearly 0 at first, so that a deep stack
        # starts as the identity (with shared_aln only the blocks' offsets are so small). They open
        # soon: a small gate does not make its own gradient small, and a step of Adam does not
        # depend on the size of gradients. On drawn shapes gates of 0.006, by a factor of 0.5, do as
        # well, and gates of 1 cost 1.1 nats per token. Factors are the release's; else 1e-5.
        gate = {16: 1e-3, 20: 1e-3, 24: 1e-4, 36: 5e-6}.get(depth, 1e-5)
        ada_factors = torch.tensor([gate, gate, 0.5, 0.5, 0.5, 0.5])        # of the six vectors
        for name, p in self.named_parameters():
            # Biases are 0, attention scales keep log 4, and all other weights are normal.
            if name.endswith('bias'):
                p.zero_()
            elif not name.endswith('scale_mul_1H11'):
                nn.init.trunc_normal_(p, std=math.sqrt(1 / (3 * w)))
            # The last layer of each of the 2 d branches: when the gates are open, the variance of
            # the residual stream still does not grow with depth.
            if name.endswith(('attn.proj.weight', 'fc2.weight')):
                p.div_(math.sqrt(2 * depth))
            # The head: the first loss is that of a uniform guess, ln V.
            if name == 'head.weight':
                p.mul_(0.02)
            # AdaLN: of the head, of a block, and a block's offset to the shared projection. That
            # projection, shared_ada_lin.1.weight, has no factor.
            if name == 'head_nm.ada_lin.1.weight':
                p.mul_(0.5)
            elif name.startswith('blocks.') and name.endswith('ada_lin.1.weight'):
                p.view(6, w, w).mul_(ada_factors[:, None, None])
            elif name.endswith('ada_gss'):
                p.normal_(std=w ** -0.5).mul_(ada_factors[:, None])

    @property
    def mask(self):
        """The block-causal mask of Fig. 4, (L, L), on the model's device."""
        return self.attn_bias_for_masking[0, 0]

    def positions(self):
        """The embeddings of position and of scale that are added to every input: (1, L, w). Without
        them the loss on drawn shapes is 0.8 nats per token higher. The first scale has pos_start as
        well: redundant, but the release has it."""
        return self.pos_1LC + self.lvl_embed(self.lvl_1L)

    def modulations(self, condition):
        """AdaLN: the class embedding (B, w) -> six vectors per block and two for the head.

        Each is (B, 1, w). They depend on the class alone, so that generation computes them once
        per image and not once per scale. 6 of the 18 in (8) are for them.
        """
        if self.shared_ada_lin:
            shared = self.shared_ada_lin(condition).unflatten(1, (1, 6, -1))    # (B, 1, 6, w)
            sixes = [block.ada_gss + shared for block in self.blocks]
        else:
            sixes = [block.ada_lin(condition).unflatten(1, (1, 6, -1)) for block in self.blocks]
        two = self.head_nm['ada_lin'](condition).unflatten(1, (1, 2, -1))       # (B, 1, 2, w)
        return [six.unbind(2) for six in sixes], two.unbind(2)

    def logits(self, x, modulation):
        """The head: x (B, l, w) -> (B, l, V), float32."""
        scale, shift = modulation
        return self.head(layer_norm(x) * (1 + scale) + shift).float()

    def forward(self, labels, x, targets=None):
        """Teacher forcing: all scales in one pass, under the block-causal mask (Fig. 4).

        labels (B,) int64; x of VQVAE.var_input, (B, L - l, z), where l is that of the first scale;
        targets (B, L) int64, the tokens.
        Returns logits (B, L, V) and the loss in nats per token, a scalar, or None without targets.
        The output at the positions of scale k predicts r_k at the same positions: unlike in
        next-token prediction, nothing is shifted by one, because their input is made of r_<k alone.
        The loss is -log of the product (6), divided by L: every token counts alike, so that with
        1, 2, 4, 8 the last scale has a weight of 64 of 85. Teacher forcing shows true coarse maps,
        and sampling the model's own, as in any autoregressive model; but there are only K steps in
        which an error can grow.
        """
        if self.training:                                       # for classifier-free guidance
            dropped = torch.rand(len(labels), device=labels.device) < self.label_dropout
            labels = labels.masked_fill(dropped, self.num_classes)
        condition = self.class_emb(labels)                                      # (B, w)
        of_blocks, of_head = self.modulations(condition)
        # [s], the start token of Fig. 4, is the class embedding.
        start = condition[:, None] + self.pos_start                             # (B, l, w)
        x = torch.cat([start, self.word_embed(x)], dim=1)                       # (B, L, w)
        x = x + self.positions()                                                # (B, L, w)
        for block, modulation in zip(self.blocks, of_blocks):
            x = block(x, modulation, self.mask)                                 # (B, L, w)
        logits = self.logits(x, of_head)                                        # (B, L, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, vae, labels, cfg=1.5, top_k=900, top_p=0.96, seed=None, given=None,
                 keep=None):
        """Draws the token maps scale by scale, equation (6): K passes, keys and values cached.

        The 680 tokens of an image of 256 px take ten passes. If the sides grow by a factor a from 1
        to P, there are 1 + log_a P passes (appendix).

        vae: a VQVAE, of which the quantizer is used. labels: (B,) class indices; num_classes for
        "no class". cfg: guidance of the last scale. Logits c with the class and u without it become
        (1 + t) c - t u, where t grows from 0 at the first scale to cfg, as in the release; a
        constant t did as well on drawn shapes. Elsewhere guidance is often s = 1 + t. top_k,
        top_p: see filter_logits. given, keep: zero-shot editing (Section 6): K token maps (B, l) or
        (1, l), and K masks (l,), bool, that say which of their tokens are kept.
        Returns K token maps (B, l), for VQVAE.decode. If numbers overflow, as they can in float16,
        all tokens of the last map are -1.
        The same seed, an int, draws the same tokens on the same kind of device. Only the copy of
        labels to a GPU waits for it.
        """
        device, B, K = self.pos_start.device, len(labels), len(self.patch_nums)
        labels = torch.as_tensor(labels, device=device)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        if cfg:
            # Classifier-free guidance doubles the batch: the class, then "no class". The second
            # half is also run at the first scale, where its weight is 0: later scales attend to
            # its keys and values.
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        condition = self.class_emb(labels)                                      # (2B, w)
        of_blocks, of_head = self.modulations(condition)
        # Allocated once for all L tokens, in the precision that autocast gives to modulations.
        d, heads, L = len(self.blocks), self.blocks[0].attn.heads, len(self.mask)
        caches = of_head[0].new_empty(d, 2, len(labels), heads, L, 64)
        positions = self.positions()                                            # (1, L, w)
        x = condition[:, None] + self.pos_start                                 # (2B, l, w)
        f_hat, maps, end = vae.quantize.empty(B), [], 0
        for k, p in enumerate(self.patch_nums):
            first, end = end, end + p * p
            x = x + positions[:, first:end]                                     # (2B, l, w)
            so_far = caches[..., :end, :]               # this scale's part is not yet written
            for block, modulation, cache in zip(self.blocks, of_blocks, so_far):
                x = block(x, modulation, None, cache)                           # (2B, l, w)
            logits = self.logits(x, of_head)                                    # (2B, l, V)
            if cfg:
                t = cfg * k / max(K - 1, 1)
                logits = (1 + t) * logits[:B] - t * logits[B:]                  # (B, l, V)
            probabilities = filter_logits(logits, top_k, top_p).softmax(-1)     # (B, l, V)
            # All tokens of the scale are drawn at once: given r_<k they are independent. Two
            # neighbours can therefore each fit what is there and not fit each other. With a single
            # map of 8x8 tokens 23 % of drawn shapes are classified correctly, and 87 % if they are
            # drawn one after the other (Raster). VAR relies on the coarser scales having settled
            # what neighbours share: with 1, 2, 4, 8 it has 66 %, and with 1, 8 even 82 %. What
            # independence costs on its last scales was not measured.
            r_k = draw(probabilities, generator)                                # (B, l)
            if given is not None:
                r_k = torch.where(keep[k], given[k], r_k)
            maps.append(r_k)
            if k + 1 < K:           # f_hat of all scales is for decode(), which goes through maps
                f_hat = vae.quantize.add_scale(f_hat, k, r_k)                   # (B, z, P, P)
                x = self.word_embed(vae.quantize.shrink(f_hat, k + 1))          # (B, l, w)
                x = torch.cat([x, x]) if cfg else x                             # (2B, l, w)
        # Numbers that overflow, as they can in float16, reach the last scale through the cache.
        maps[-1] = torch.where(probabilities.isnan().any(), -1, maps[-1])
        return maps


# ---- Sampling ----


def filter_logits(logits, top_k=0, top_p=0.0):
    """Top-k, then nucleus (top-p) sampling: keeps the likeliest logits (..., V) and sets the others
    to -inf.

    The nucleus is the smallest set of codes whose probability reaches top_p, and never empty. 0
    switches either off.
    """
    if 0 < top_k < logits.shape[-1]:
        likeliest = logits.topk(top_k).indices                              # (..., k)
        outside = torch.ones_like(logits, dtype=torch.bool).scatter(-1, likeliest, False)
        logits = logits.masked_fill(outside, -torch.inf)
    if 0 < top_p < 1:
        # A code is outside if those that are likelier reach top_p without it: for a top_p of 0.6,
        # of 0.4, 0.3, 0.2 and 0.1 the last two.
        descending, order = logits.sort(dim=-1, descending=True)
        p = descending.softmax(-1)                                          # (..., V)
        outside = p.cumsum(-1) - p >= top_p                                 # in descending order
        outside = outside.scatter(-1, order, outside)                       # in the codes' order
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def draw(probabilities, generator):
    """One code from each distribution: (B, l, V) -> (B, l).

    For independent exponential e_i, p_i / e_i is the greatest of all with probability p_i.
    torch.multinomial does the same, but waits for the GPU to check its input.
    """
    e = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / e).argmax(-1)
