"""The multi-scale VQVAE of VAR: an image becomes K token maps, from coarse to fine, and back.

    vae = VQVAE()
    maps = vae.encode(images)       # Algorithm 1: a list of K token maps
    images = vae.decode(maps)       # Algorithm 2

Paper (arXiv 2404.02905): Section 3.1, equations (2) to (5); Section 3.2, Algorithms 1 and 2.
Where paper and release differ, this file follows the release; README.md lists where. Forward and
loss of the released tokenizer are published; its training loop, discriminator and the start of its
codebook are not, so that the training of the codebook is this project's. Numbers for drawn shapes
are from experiments/reasons.py, after a short training with each choice.

Letters: B batch, H W image size, C channels, z code dimension, V codes, K scales, p side of the
token map of one scale, P side of the last one and of the latent, l = p * p tokens of one scale,
L tokens of all scales. k is one of the scales, from 0, where the paper counts from 1. `maps` is a
list of K token maps r_k, int64 (B, l); `tokens` are those of all scales in one tensor (B, L).
Parameters have the names of the released files, so that weights load in both directions:
`quant_resi` holds the phi, and `ema_vocab_hit_SV` the usage of the codes by scale (S) and code (V).
Images are float32 (B, 3, H, W) in [-1, 1].
"""
import math
from collections import OrderedDict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---- Encoder and decoder (VQGAN's, Section 4): f = E(im) of (2), im_hat = D(f_hat) of (4) ----


def conv3x3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def sequence(**modules):
    """An nn.Sequential whose modules have names: those of the released files."""
    return nn.Sequential(OrderedDict(modules))


def group_norm(channels):
    """Group normalisation with 32 groups, or with fewer where 32 does not divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions and a shortcut, which is a 1x1 convolution where the width changes.

    norm, here and below, is group_norm or nn.Identity: what is called with a number of channels.
    """

    def __init__(self, c_in, c_out, norm):
        super().__init__()
        self.norm1 = norm(c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = norm(c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                               # (B, c_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))                               # (B, c_out, H, W)
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention with a single head over all positions.

    It makes every position depend on every other, in both directions. This is the paper's first
    objection to raster order (Fig. 9): the chain rule (1) holds in any order, but in raster order a
    model has to guess early tokens that depend on later ones. A coarse map depends on the whole
    image as well, but it comes first, and the finer maps only add to it.
    """

    def __init__(self, c, norm):
        super().__init__()
        self.norm = norm(c)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, C, H * W)
        q, k, v = qkv.transpose(2, 3).unbind(1)                             # (B, H*W, C) each
        weights = (q @ k.transpose(1, 2) * C ** -0.5).softmax(-1)           # (B, H*W, H*W)
        h = (weights @ v).transpose(1, 2).reshape(B, C, H, W)
        return x + self.proj_out(h)


class Level(nn.Module):
    """One resolution: residual blocks, with attention after each one at the lowest resolution,
    then the convolution that leads to the next resolution."""

    def __init__(self, c_in, c, blocks, norm, attend, down=False, up=False):
        super().__init__()
        widths = [c_in] + [c] * blocks
        self.block = nn.ModuleList(ResBlock(a, b, norm) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(c, norm) if attend else nn.Identity()
                                  for _ in range(blocks))
        self.downsample = nn.Identity()
        self.upsample = nn.Identity()
        if down:
            # The released network pads with zeros at the right and at the bottom only.
            self.downsample = sequence(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, 2))
        if up:
            self.upsample = sequence(enlarge=nn.Upsample(scale_factor=2), conv=conv3x3(c, c))

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


def middle(c, norm):
    return sequence(block_1=ResBlock(c, c, norm), attn_1=AttnBlock(c, norm),
                    block_2=ResBlock(c, c, norm))


def make_encoder(ch, ch_mult, z, blocks, norm):
    """(B, 3, H, W) -> (B, z, P, P) with P = H / 2 ** (len(ch_mult) - 1)."""
    levels, c_in, last = [], ch, len(ch_mult) - 1
    for i, multiple in enumerate(ch_mult):
        c = ch * multiple
        levels.append(Level(c_in, c, blocks, norm, attend=i == last, down=i < last))
        c_in = c
    return sequence(conv_in=conv3x3(3, ch), down=nn.Sequential(*levels), mid=middle(c, norm),
                    norm_out=norm(c), silu=nn.SiLU(), conv_out=conv3x3(c, z))


def make_decoder(ch, ch_mult, z, blocks, norm):
    """(B, z, P, P) -> (B, 3, H, W): the encoder's mirror image, with one residual block more per
    level. Level 0 is the finest and runs last."""
    last = len(ch_mult) - 1
    lowest = c_in = ch * ch_mult[last]
    levels = {}
    for i in range(last, -1, -1):
        c = ch * ch_mult[i]
        levels[str(i)] = Level(c_in, c, blocks + 1, norm, attend=i == last, up=i > 0)
        c_in = c
    return sequence(conv_in=conv3x3(z, lowest), mid=middle(lowest, norm), up=sequence(**levels),
                    norm_out=norm(c), silu=nn.SiLU(), conv_out=conv3x3(c, 3))


# ---- The multi-scale quantizer: equation (3), Algorithms 1 and 2 ----


class Phi(nn.Conv2d):
    """phi(x) = 0.5 x + 0.5 conv(x), for x (B, z, P, P).

    Section 3.2: it repairs what a token map loses when it is enlarged. The paper has one for each
    scale, the release four, which its ten scales share: choose_phi(). It starts as the identity.
    Without phi, or with one for all scales, results on drawn shapes were not worse; images of 256
    px were not tried. A subclass of Conv2d because of the released names.
    """

    def __init__(self, z):
        super().__init__(z, z, 3, padding=1)
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return 0.5 * x + 0.5 * super().forward(x)


def choose_phi(K, count):
    """Which of `count` shared phi serves each of K scales: a list of K indices. For the release's
    ten scales and four phi they are 0 0 1 1 1 2 2 3 3 3.

    Each phi has a tick, evenly spaced from 1/12 to 11/12 for four phi, and from 1/(2n) to
    1 - 1/(2n) for another number n. Scale k takes the phi whose tick is nearest to k / (K - 1).
    Above, k = 2 and k = 7 lie exactly between two ticks, and the rounding of float64 decides:
    another formula for the same ticks could break the released weights.
    """
    edge = 1 / 12 if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    return [int(np.argmin(np.abs(ticks - k / max(K - 1, 1)))) for k in range(K)]


def scale_of_token(patch_nums):
    """The scale that each of the L tokens belongs to, from 0: (L,) int64, rising."""
    return torch.arange(len(patch_nums)).repeat_interleave(torch.tensor(patch_nums) ** 2)


class Quantizer(nn.Module):
    """One codebook for all scales, the shared phi, and the step that both algorithms share.

    wide_k are the codes of one token map, enlarged to (B, z, P, P). Algorithm 2 adds phi_k(wide_k)
    to f_hat, and Algorithm 1 subtracts it from f. Here both call `add_scale`: the residual of
    Algorithm 1 is f - f_hat, with f_hat as Algorithm 2 has it so far. An example with z = 1, a
    codebook of the four numbers -2, 0, 1 and 3, the scales 1x1 and 2x2, and phi still the identity;
    rows of a 2x2 latent are in brackets:

        f                   [1.2  3.1] [3.7  4.0]   what is to be encoded
        scale 1x1           its mean is 3.0, and the nearest code is 3
        f_hat               [ 3    3 ] [ 3    3 ]   3, enlarged
        residual f - f_hat  [-1.8 0.1] [0.7  1.0]
        scale 2x2           the nearest codes are [-2 0] [1 1]
        f_hat               [ 1    3 ] [ 4    4 ]   what the decoder gets
        residual f - f_hat  [0.2  0.1] [-0.3 0.0]   what is lost

    If phi makes 2.8 of the 3, the decoder sees 2.8, and the later scales have to encode f - 2.8. If
    wide_k were subtracted instead, the residual would be f - 3, and no later scale would see the
    0.2 that the decoder lacks. (On drawn shapes the difference was within the spread of seeds.)

    One codebook serves all scales, because all of them encode a part of the same f, and f_hat is
    their sum. Shrinking by area takes the mean, which is nearest to a cell in mean square.
    Enlarging is bicubic, as in the release: smooth, where nearest neighbours would leave steps. As
    in the release, codes are compared and summed in float32, outside of autocast.
    """
    decay = 0.98            # of the EMA
    dead_below = 0.02       # a code is dead when it has less than this share of the average usage

    def __init__(self, patch_nums, V, z, phi_count):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.V = V
        self.embedding = nn.Embedding(V, z)
        self.embedding.requires_grad_(False)                # an EMA codebook: see update()
        # All codes are 0 at first, so that code 0 is taken for every vector: the first update()
        # makes it their mean, and restarts all others, as dead ones, as random vectors. So nobody
        # has to choose how large random codes should be; on drawn shapes such codes did as well.
        nn.init.zeros_(self.embedding.weight)
        phis = nn.ModuleList(Phi(z) for _ in range(phi_count))
        self.quant_resi = nn.ModuleDict({'qresi_ls': phis})
        self.phi_index = choose_phi(len(patch_nums), phi_count)
        # EMA of the share of all tokens that each scale and code have; its sum is 0 at first, and
        # soon about 1. By scale, because the released buffer is; only its sum over them is used.
        self.register_buffer('ema_vocab_hit_SV', torch.zeros(len(patch_nums), V))
        # Buffers, so that they lie on the GPU and no training step waits for a copy.
        sizes = torch.tensor(patch_nums) ** 2
        self.register_buffer('sizes', sizes, persistent=False)                          # (K,)
        self.register_buffer('starts', sizes.cumsum(0) - sizes, persistent=False)       # (K,)
        self.register_buffer('scale_of_token', scale_of_token(patch_nums), persistent=False)
        # Enlarging is F.interpolate. It is linear, so that its results for unit vectors are the
        # matrix of it, and a product with that matrix is faster: on a GPU, F.interpolate has one
        # thread per pixel for all images and channels.
        matrices = [F.interpolate(torch.eye(p * p).unflatten(1, (1, p, p)), patch_nums[-1],
                                  mode='bicubic').flatten(1) for p in patch_nums]
        self.register_buffer('bicubic', torch.cat(matrices), persistent=False)  # (L, P * P)

    def phi(self, k):
        """phi_k: the Phi that serves scale k."""
        return self.quant_resi['qresi_ls'][self.phi_index[k]]

    def shrink(self, f, k):
        """interpolate(f, h_k, w_k) by area: f (B, z, P, P) -> (B, l, z). Where p does not divide P,
        the cells overlap. At the last scale, p = P, both interpolations are the identity."""
        small = F.interpolate(f, self.patch_nums[k], mode='area')           # (B, z, p, p)
        return small.flatten(2).transpose(1, 2)                             # (B, l, z)

    def enlarge(self, z_k, k):
        """interpolate(z_k, h_K, w_K), bicubic: z_k (B, l, z) -> (B, z, P, P)."""
        P = self.patch_nums[-1]
        matrix = self.bicubic.split([p * p for p in self.patch_nums])[k]    # (l, P * P)
        return (z_k.transpose(1, 2) @ matrix).unflatten(2, (P, P))

    def empty(self, B):
        """f_hat before the first scale: zeros (B, z, P, P)."""
        codes, P = self.embedding.weight, self.patch_nums[-1]
        return codes.new_zeros(B, codes.shape[1], P, P)

    def add_scale(self, f_hat, k, r_k):
        """The body of the loop of Algorithm 2: look up, enlarge, phi, add.

        f_hat (B, z, P, P): the sum over the scales before k; r_k (B, l), the tokens of scale k.
        Returns f_hat including scale k, (B, z, P, P), float32.
        """
        z_k = self.embedding(r_k)                                           # (B, l, z)
        with torch.autocast(z_k.device.type, enabled=False):
            wide_k = self.enlarge(z_k.float(), k)                           # (B, z, P, P)
            return f_hat + self.phi(k)(wide_k)                              # (B, z, P, P)

    def nearest(self, x):
        """Equation (3): argmin_v ||e_v - x||_2 for vectors x (B, l, z) -> tokens (B, l)."""
        codes = self.embedding.weight                                       # (V, z)
        # ||e - x||^2 = ||x||^2 - 2 (x.e - ||e||^2 / 2), and ||x||^2 is the same for all codes.
        with torch.autocast(x.device.type, enabled=False):
            score = torch.addmm(-0.5 * codes.square().sum(1), x.flatten(0, 1), codes.T)
        return score.argmax(1).view(x.shape[:2])

    def algorithm1(self, f):
        """Algorithm 1 on f (B, z, P, P), scale by scale.

        Yields for each scale the tokens r_k (B, l); the vectors (B, l, z) that were quantized,
        which are the shrunk residual and not codes; and f_hat (B, z, P, P) including this scale.
        """
        f_hat = self.empty(len(f))
        for k in range(len(self.patch_nums)):
            residual = (f - f_hat).detach()
            vectors = self.shrink(residual, k)                              # (B, l, z)
            r_k = self.nearest(vectors)                                     # (B, l)
            f_hat = self.add_scale(f_hat, k, r_k)                           # (B, z, P, P)
            yield r_k, vectors, f_hat

    def algorithm2(self, maps):
        """Algorithm 2 without decoder: yields f_hat (B, z, P, P) after each token map (B, l)."""
        f_hat = self.empty(len(maps[0]))
        for k, r_k in enumerate(maps):
            f_hat = self.add_scale(f_hat, k, r_k)
            yield f_hat

    def count(self, tokens):
        """How often each scale uses each code: tokens (B, L) -> (K, V) float32."""
        K, V = len(self.patch_nums), self.V
        cell = (self.scale_of_token * V + tokens).flatten()                 # in a flattened (K, V)
        ones = torch.ones(len(cell), device=tokens.device)
        return torch.zeros(K * V, device=tokens.device).index_add_(0, cell, ones).view(K, V)

    @torch.no_grad()
    def update(self, tokens, vectors):
        """One EMA step of the codebook, with the batches of all processes.

        tokens (B, L) and the vectors (B, L, z) that were quantized to them, of all scales. A batch
        that is not finite changes nothing. Nothing here waits for a GPU.
        """
        codes, hits, decay = self.embedding.weight, self.ema_vocab_hit_SV, self.decay
        K, V = hits.shape                                                   # codes (V, z)
        vectors = vectors.float()

        # 1. Count: how often the batch uses each code, per scale.
        n = self.count(tokens)                                              # (K, V)

        # 2. Sum the vectors that are assigned to each code.
        s = torch.zeros_like(codes).index_add_(0, tokens.flatten(), vectors.flatten(0, 1))
        if dist.is_initialized():                                           # of all processes
            dist.all_reduce(n)
            dist.all_reduce(s)

        # 3. EMA with decay d of counts, N' = d N + (1 - d) n, and of sums, S' = d S + (1 - d) s; a
        #    code is e = S / N. Only e and N are stored, since S is N e. Counts and sums are divided
        #    by the number of tokens, so that the size of a batch does not matter.
        s = s / n.sum()
        n = n / n.sum()
        old_sum = hits.sum(0)[:, None] * codes                              # (V, z)
        new_hits = decay * hits + (1 - decay) * n                           # (K, V)
        N = new_hits.sum(0)                                                 # (V,)
        new_codes = (decay * old_sum + (1 - decay) * s) / N.clamp_min(1e-12)[:, None]

        # 4. Restart: a dead code becomes a random vector of the batch. Code v takes it from scale
        #    v mod K, so that all scales provide equally many. With the scales 1, 2, 4, whose tokens
        #    begin at 0, 1 and 5, code 8 takes the third: one of the tokens 5 to 20 of an image.
        #    Drawn from all 21 alike, 1 in 21 would come from the first scale. With drawn shapes and
        #    the scales 1, 2, 4, 8, it then used 11 codes in place of 16, at the same PSNR.
        scale = torch.arange(V, device=codes.device) % K                    # (V,)
        within = (torch.rand(V, device=codes.device) * self.sizes[scale]).long()
        image = torch.randint(len(tokens), (V,), device=codes.device)
        fresh = vectors[image, self.starts[scale] + within]                 # (V, z)
        dead = N < self.dead_below / V                                      # (V,)
        new_codes = torch.where(dead[:, None], fresh, new_codes)
        # A restarted code starts with a tenth of the average usage, and is dead again after about
        # 80 steps without a hit (decay 0.98).
        new_hits = torch.where(dead, 0.1 / (V * K), new_hits)

        finite = s.isfinite().all()
        codes.copy_(torch.where(finite, new_codes, codes))
        hits.copy_(torch.where(finite, new_hits, hits))
        if dist.is_initialized():
            # Restarted codes differ among the processes, and on a GPU also the last bits of sums.
            # All take the codes of the first process.
            dist.broadcast(codes, 0)


class VQVAE(nn.Module):
    """The tokenizer: encoder, quantizer, decoder.

    patch_nums: the sides of the K token maps. phi_count: how many phi the scales share. The
    defaults are the released network (109 M).
    Images are (B, 3, H, W) in [-1, 1] with H = W = image_size; maps are a list of K int64 tensors
    (B, l).
    normalise=False leaves out group normalisation, as training does below 256 px. The released
    network has it.
    """

    def __init__(self, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=4096, z_channels=32,
                 ch=160, ch_mult=(1, 1, 2, 2, 4), phi_count=4, res_blocks=2, normalise=True):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.image_size = patch_nums[-1] * 2 ** (len(ch_mult) - 1)
        norm = group_norm if normalise else nn.Identity
        self.encoder = make_encoder(ch, ch_mult, z_channels, res_blocks, norm)
        self.decoder = make_decoder(ch, ch_mult, z_channels, res_blocks, norm)
        self.quant_conv = conv3x3(z_channels, z_channels)
        self.post_quant_conv = conv3x3(z_channels, z_channels)
        self.init_weights()         # before there are phi, so that these stay the identity
        self.quantize = Quantizer(patch_nums, vocab_size, z_channels, phi_count)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def init_weights(self):
        """Initial weights of encoder and decoder; the release publishes none."""
        for name, module in self.named_modules():
            # Convolutions keep the variance of their input.
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
            # Residual branches start at zero, so that a deep network without normalisation is
            # stable.
            if name.endswith(('conv2', 'proj_out')):
                nn.init.zeros_(module.weight)

    def to_latent(self, images):
        """f = E(im), equation (2): (B, 3, H, W) -> (B, z, P, P), float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(images)).float()

    def to_image(self, f_hat):
        """im_hat = D(f_hat), equation (4): (B, z, P, P) -> (B, 3, H, W), float32, not clamped."""
        return self.decoder(self.post_quant_conv(f_hat)).float()

    @torch.no_grad()
    def encode(self, images):
        """Algorithm 1: images (B, 3, H, W) in [-1, 1] -> K token maps (B, l).

        In float32 even inside autocast: with bfloat16 in the encoder, up to 5 % of the tokens of
        the fine scales would differ.
        """
        with torch.autocast(images.device.type, enabled=False):
            return [r_k for r_k, _, _ in self.quantize.algorithm1(self.to_latent(images))]

    @torch.no_grad()
    def decode(self, maps):
        """Algorithm 2: K token maps (B, l) -> images (B, 3, H, W) in [-1, 1]."""
        *_, f_hat = self.quantize.algorithm2(maps)
        return self.to_image(f_hat).clamp(-1, 1)

    @torch.no_grad()
    def decode_scales(self, maps):
        """The image after each scale: K tensors (B, 3, H, W), the last one equal to decode()."""
        return [self.to_image(f_hat).clamp(-1, 1) for f_hat in self.quantize.algorithm2(maps)]

    def var_input(self, maps):
        """The transformer's input for all scales but the first, under teacher forcing.

        The input for scale k is the accumulated f_hat of all scales before it, shrunk to the size
        of scale k. It is not the embeddings of r_{k-1}, as Fig. 4 may suggest: each map refines
        what all before it have made. With r_{k-1} alone the loss on drawn shapes is 3.27 nats per
        token in place of 3.04, but samples are not worse. Returns (B, L - l, z), where l are the
        tokens of the first scale.
        """
        parts = [self.quantize.shrink(f_hat, k)                             # (B, l, z) each
                 for k, f_hat in enumerate(self.quantize.algorithm2(maps[:-1]), start=1)]
        return torch.cat(parts, dim=1)

    def forward(self, images):
        """One training pass: images (B, 3, H, W) -> rebuilt (B, 3, H, W) and the quantizer loss, a
        scalar. In training it also moves the codebook. Stage 2 never calls it.

        The loss is || f - f_hat || of (5), as two mean squares, averaged over f_hat after each of
        the scales, as in the release. With the loss after the last scale alone, drawn shapes are
        0.4 dB worse after the first scale and 0.3 dB better after the last; samples are better,
        too.
            term                            constant    trains
            mean square of f - f_hat        f           phi (in the release the codebook, too)
            0.25 x the same: commitment     f_hat       the encoder; the weight is the release's
            losses of the image             f_hat - f   the decoder, and by the straight-through
                                                        estimator the encoder, but not phi
        """
        f = self.to_latent(images)                                          # (B, z, P, P)
        loss, tokens, vectors = 0., [], []
        for r_k, v_k, f_hat in self.quantize.algorithm1(f):
            phi_loss = F.mse_loss(f_hat, f.detach())                        # trains phi
            commitment_loss = F.mse_loss(f_hat.detach(), f)                 # trains the encoder
            loss = loss + (phi_loss + 0.25 * commitment_loss) / len(self.patch_nums)
            tokens.append(r_k)
            vectors.append(v_k)
        if self.training:
            self.quantize.update(torch.cat(tokens, dim=1), torch.cat(vectors, dim=1))
        # Straight-through estimator: the decoder sees f_hat, and its gradient passes on to f.
        return self.to_image(f + (f_hat - f).detach()), loss
