"""The multi-scale VQVAE of VAR: an image becomes K token maps, from coarse to fine, and back.

    vae = VQVAE()
    tokens = vae.encode(images)     # Algorithm 1: a list of K token maps
    images = vae.decode(tokens)     # Algorithm 2

Paper (arXiv 2404.02905): Section 3.1, equations (2) to (5); Section 3.2, Algorithms 1 and 2.

Where the text and the released weights differ, this file follows the weights:
- The text has one convolution phi_k per scale; in the weights, K scales share four of them.
- phi is a residual map: half its input, half a convolution of it.
The code that trained the released tokenizer was never published. Here the codebook is an EMA of
the vectors that are assigned to each code, and dead codes are restarted (Quantizer.update). phi
starts as the identity, and a tenth of the images are rebuilt from fewer scales (VQVAE.forward).

Letters: B batch, H W image size, C channels, z code dimension, V codes, K scales, p side of the
token map of one scale, P side of the last one and of the latent, l = p * p tokens of one scale,
L tokens of all scales. k is one of the scales: from 0 in code, from 1 in the paper's formulas and
where a text speaks of scale 1.
Parameters have the names of the released files, so that weights load in both directions.

The end of the file converts between image files and tensors: images are uint8 (H, W, 3) in files
and arrays, and float32 (3, H, W) in [-1, 1] in the tokenizer.
"""
import math
import os
import struct
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

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
    """Two convolutions and a shortcut, which is a 1x1 convolution where the width changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1 = group_norm(c_in)
        self.conv1 = conv3x3(c_in, c_out)
        self.norm2 = group_norm(c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                               # (B, c_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))                               # (B, c_out, H, W)
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention with a single head over all positions.

    It makes every position depend on every other, in both directions. This is the paper's first
    objection to raster order: (1) assumes that a token depends on earlier ones alone (Fig. 9).
    """

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
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

    def __init__(self, c_in, c, blocks, attend, down=False, up=False):
        super().__init__()
        widths = [c_in] + [c] * blocks
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(AttnBlock(c) if attend else nn.Identity() for _ in range(blocks))
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


def middle(c):
    return sequence(block_1=ResBlock(c, c), attn_1=AttnBlock(c), block_2=ResBlock(c, c))


def make_encoder(ch, ch_mult, z, blocks):
    """(B, 3, H, W) -> (B, z, P, P) with P = H / 2 ** (len(ch_mult) - 1)."""
    last = len(ch_mult) - 1
    widths = [ch] + [ch * m for m in ch_mult]
    levels = [Level(widths[i], widths[i + 1], blocks, attend=i == last, down=i < last)
              for i in range(last + 1)]
    return sequence(conv_in=conv3x3(3, ch), down=nn.Sequential(*levels), mid=middle(widths[-1]),
                    norm_out=group_norm(widths[-1]), silu=nn.SiLU(),
                    conv_out=conv3x3(widths[-1], z))


def make_decoder(ch, ch_mult, z, blocks):
    """(B, z, P, P) -> (B, 3, H, W): the encoder's mirror image, with one residual block more per
    level. Level 0 is the finest and runs last."""
    last = len(ch_mult) - 1
    widths = [ch * m for m in ch_mult]
    levels = {str(i): Level(widths[min(i + 1, last)], widths[i], blocks + 1, attend=i == last,
                            up=i > 0) for i in range(last, -1, -1)}
    return sequence(conv_in=conv3x3(z, widths[-1]), mid=middle(widths[-1]), up=sequence(**levels),
                    norm_out=group_norm(widths[0]), silu=nn.SiLU(),
                    conv_out=conv3x3(widths[0], 3))


# ---- The multi-scale quantizer: equation (3), Algorithms 1 and 2 ----


class Phi(nn.Conv2d):
    """phi(h) = (1 - r) h + r conv(h) with r = 0.5, for h (B, z, P, P).

    Section 3.2: it repairs what a token map loses when it is enlarged. It starts as the identity.
    """
    r = 0.5

    def __init__(self, z):
        super().__init__(z, z, 3, padding=1)
        nn.init.dirac_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, h):
        return (1 - self.r) * h + self.r * super().forward(h)


def choose_phi(K, count):
    """Which of `count` shared phi serves each of K scales: a list of K indices.

    Scale k takes the phi whose tick is nearest to k / (K - 1). The ticks are evenly spaced from
    1/12 to 11/12 for four phi, as in the release, and from 1 / 2n to 1 - 1 / 2n for n others.
    For K = 10 and four phi the indices are 0 0 1 1 1 2 2 3 3 3: the ticks are 3/36, 13/36, 23/36
    and 33/36, so that k = 2 (2/9) and k = 7 (7/9) lie exactly between two of them, and the rounding
    of float64 decides. Another formula for the same ticks can decide otherwise, and would then
    break the released weights.
    """
    edge = 1 / 12 if count == 4 else 1 / 2 / count
    ticks = np.linspace(edge, 1 - edge, count)
    return [int(np.argmin(np.abs(ticks - k / max(K - 1, 1)))) for k in range(K)]


def scale_of_token(patch_nums):
    """The scale that each of the L tokens belongs to, from 0: (L,) int64, rising."""
    return torch.arange(len(patch_nums)).repeat_interleave(torch.tensor(patch_nums) ** 2)


def all_processes(x):
    """x (B, ...) of every process, concatenated: the whole batch, in the order of the ranks."""
    if not dist.is_initialized():
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class Quantizer(nn.Module):
    """One codebook for all scales, the shared phi, and the step that both algorithms share.

    Algorithm 1 subtracts phi_k(z_k) from f, Algorithm 2 adds it to f_hat. Here both call
    `add_scale`: the residual of Algorithm 1 is f - f_hat, with f_hat as Algorithm 2 has it so far.
    As in the release, codes are compared and summed in float32, outside of autocast.
    """
    dead_below = 0.02       # a code is dead when it has less than this share of the average usage

    def __init__(self, patch_nums, V, z, phi_count):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.V = V
        self.embedding = nn.Embedding(V, z)
        self.embedding.requires_grad_(False)                # an EMA codebook: see update()
        phis = nn.ModuleList(Phi(z) for _ in range(phi_count))
        self.quant_resi = nn.ModuleDict({'qresi_ls': phis})
        self.phi_index = choose_phi(len(patch_nums), phi_count)
        # EMA of how often each scale uses each code; the released file has this buffer too.
        self.register_buffer('ema_vocab_hit_SV', torch.zeros(len(patch_nums), V))
        # As buffers these are on the GPU already: no training step has to copy them, and wait.
        self.register_buffer('sizes', torch.tensor(patch_nums) ** 2, persistent=False)      # (K,)
        self.register_buffer('scale_of_token', scale_of_token(patch_nums), persistent=False)

    def phi(self, k):
        """phi_k: the Phi that serves scale k."""
        return self.quant_resi['qresi_ls'][self.phi_index[k]]

    def shrink(self, f, k):
        """interpolate(f, h_k, w_k) by area: f (B, z, P, P) -> (B, l, z)."""
        # Apple's mps has no area interpolation to sizes that do not divide P.
        source = f.cpu() if f.device.type == 'mps' else f
        small = F.interpolate(source, self.patch_nums[k], mode='area')      # (B, z, p, p)
        return small.flatten(2).transpose(1, 2).to(f.device)                # (B, l, z)

    def add_scale(self, f_hat, k, z_k):
        """f_hat + phi_k(interpolate(z_k, h_K, w_K)): one turn of the loop of Algorithm 2.

        f_hat (B, z, P, P): the sum over the scales before k, or 0 before the first.
        z_k (B, l, z): the embeddings of r_k. Returns (B, z, P, P), float32.
        """
        p, P = self.patch_nums[k], self.patch_nums[-1]
        h = z_k.float().transpose(1, 2).unflatten(2, (p, p))                # (B, z, p, p)
        with torch.autocast(h.device.type, enabled=False):
            if p != P:
                h = F.interpolate(h, P, mode='bicubic')                     # (B, z, P, P)
            return f_hat + self.phi(k)(h)

    def nearest(self, x):
        """Equation (3): argmin_v ||e_v - x||_2 for vectors x (B, l, z) -> tokens (B, l)."""
        codes = self.embedding.weight                                       # (V, z)
        # ||e - x||^2 = ||x||^2 - 2 (x.e - ||e||^2 / 2), and ||x||^2 is the same for all codes.
        with torch.autocast(x.device.type, enabled=False):
            score = torch.addmm(-0.5 * codes.square().sum(1), x.flatten(0, 1), codes.T)
        return score.argmax(1).view(x.shape[:2])

    def algorithm1(self, f):
        """Algorithm 1 on f (B, z, P, P), scale by scale.

        Yields for each scale the tokens r_k (B, l), the vectors that they stand for (B, l, z), and
        f_hat (B, z, P, P) including this scale.
        """
        f_hat = torch.zeros_like(f)
        for k in range(len(self.patch_nums)):
            residual = (f - f_hat).detach()
            vectors = self.shrink(residual, k)                              # (B, l, z)
            r_k = self.nearest(vectors)                                     # (B, l)
            f_hat = self.add_scale(f_hat, k, self.embedding(r_k))           # (B, z, P, P)
            yield r_k, vectors, f_hat

    def algorithm2(self, tokens):
        """Algorithm 2 without decoder: yields f_hat (B, z, P, P) after each token map (B, l)."""
        f_hat = 0
        for k, r_k in enumerate(tokens):
            f_hat = self.add_scale(f_hat, k, self.embedding(r_k))
            yield f_hat

    def count(self, tokens):
        """How often each scale uses each code: tokens (B, L) -> (K, V) float32."""
        K, V = len(self.patch_nums), self.V
        place = (self.scale_of_token * V + tokens).flatten()                # in a flattened (K, V)
        ones = torch.ones(len(place), device=tokens.device)
        return torch.zeros(K * V, device=tokens.device).index_add_(0, place, ones).view(K, V)

    @torch.no_grad()
    def update(self, tokens, vectors, decay):
        """One EMA step of the codebook, with the whole batch of all processes.

        tokens (B, L) and vectors (B, L, z), of all scales, as VQVAE.forward returns them.
        A batch that is not finite changes nothing. Nothing here waits for a GPU.
        """
        tokens = all_processes(tokens)
        vectors = all_processes(vectors.float())
        codes, hits = self.embedding.weight, self.ema_vocab_hit_SV          # (V, z), (K, V)
        K, V = hits.shape

        # 1. Count: how often the batch uses each code, per scale.
        n = self.count(tokens)                                              # (K, V)

        # 2. Sum the vectors that are assigned to each code.
        s = torch.zeros_like(codes).index_add_(0, tokens.flatten(), vectors.flatten(0, 1))

        # 3. EMA of counts and sums. A code is the mean of its vectors, so that e N is their sum,
        #    and counts and codes are all that has to be stored:
        #    N' = d N + (1 - d) n,    e' = (d N e + (1 - d) s) / N'.
        old_sum = hits.sum(0)[:, None] * codes                              # (V, z)
        new_hits = decay * hits + (1 - decay) * n                           # (K, V)
        N = new_hits.sum(0)                                                 # (V,)
        new_codes = (decay * old_sum + (1 - decay) * s) / N.clamp_min(1e-9)[:, None]

        # 4. Restart: a dead code becomes a random vector of the batch. Each scale provides as many
        #    as any other. Drawn from all vectors alike, 1 in L would come from the first scale,
        #    and the coarse scales would collapse onto a few codes.
        scale = torch.arange(V, device=codes.device) % K                    # (V,)
        first = (self.sizes.cumsum(0) - self.sizes)[scale]                  # (V,)
        place = first + (torch.rand(V, device=codes.device) * self.sizes[scale]).long()
        image = torch.randint(len(tokens), (V,), device=codes.device)
        fresh = vectors[image, place]                                       # (V, z)
        average = tokens.numel() / V
        dead = N < self.dead_below * average                                # (V,)
        new_codes = torch.where(dead[:, None], fresh, new_codes)
        # It starts with a tenth of the average usage, and is dead again after about 80 steps
        # without a hit (decay 0.98).
        new_hits = torch.where(dead, 0.1 * average / K, new_hits)

        finite = vectors.isfinite().all()
        codes.copy_(torch.where(finite, new_codes, codes))
        hits.copy_(torch.where(finite, new_hits, hits))
        if dist.is_initialized():
            # On a GPU index_add_ adds in any order, and the last bits would differ among processes.
            dist.broadcast(codes, 0)


class VQVAE(nn.Module):
    """The tokenizer: encoder, quantizer, decoder.

    patch_nums: the sides of the K token maps. The defaults are the released network (109 M).
    Images are (B, 3, H, W) in [-1, 1] with H = W = image_size; tokens are a list of K int64
    tensors (B, l).
    normalise=False leaves out group normalisation. Small networks then train far better: 60 s of
    autoencoding CIFAR-10 on two cores (batch 32) end at 25 dB, and at 20 dB with it.
    """
    scale_dropout = 0.1     # share of the training images that are rebuilt from fewer scales

    def __init__(self, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=4096, z_channels=32,
                 ch=160, ch_mult=(1, 1, 2, 2, 4), share_quant_resi=4, res_blocks=2, normalise=True):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.image_size = patch_nums[-1] * 2 ** (len(ch_mult) - 1)
        self.encoder = make_encoder(ch, ch_mult, z_channels, res_blocks)
        self.decoder = make_decoder(ch, ch_mult, z_channels, res_blocks)
        self.quant_conv = conv3x3(z_channels, z_channels)
        self.post_quant_conv = conv3x3(z_channels, z_channels)
        self.init_weights(normalise)            # of all but phi, which starts as the identity
        self.quantize = Quantizer(patch_nums, vocab_size, z_channels, share_quant_resi)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def init_weights(self, normalise):
        """Initial weights of encoder and decoder; the release publishes none."""
        for name, module in list(self.named_modules()):
            # Convolutions keep the variance of their input.
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
            # Residual branches start at zero, so that a deep network without normalisation is
            # stable, and one with normalisation trains faster.
            if name.endswith(('conv2', 'proj_out')):
                nn.init.zeros_(module.weight)
            if isinstance(module, nn.GroupNorm) and not normalise:
                self.set_submodule(name, nn.Identity())

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
        the fine scales would be others. (From Ampere on, PyTorch computes the convolutions of
        float32 in TF32, unless torch.backends.cudnn.allow_tf32 is False.)
        """
        with torch.autocast(images.device.type, enabled=False):
            return [r_k for r_k, _, _ in self.quantize.algorithm1(self.to_latent(images))]

    @torch.no_grad()
    def decode(self, tokens):
        """Algorithm 2: K token maps (B, l) -> images (B, 3, H, W) in [-1, 1]."""
        *_, f_hat = self.quantize.algorithm2(tokens)
        return self.to_image(f_hat).clamp(-1, 1)

    @torch.no_grad()
    def decode_scales(self, tokens):
        """The image after each scale: K tensors (B, 3, H, W), the last one equal to decode()."""
        return [self.to_image(f_hat).clamp(-1, 1) for f_hat in self.quantize.algorithm2(tokens)]

    def var_input(self, tokens):
        """The transformer's input for scales 2 to K under teacher forcing: (B, L - p_1^2, z).

        The input for scale k is the accumulated f_hat of all scales before it, shrunk to the size
        of scale k. It is not the embeddings of r_{k-1}, as Fig. 4 may suggest.
        """
        sums = self.quantize.algorithm2(tokens[:-1])
        parts = [self.quantize.shrink(f_hat, k) for k, f_hat in enumerate(sums, start=1)]
        if not parts:                                           # a single scale has no such input
            return self.quantize.embedding(tokens[0][:, :0])
        return torch.cat(parts, dim=1)

    def forward(self, images):
        """One training pass: images (B, 3, H, W) -> rebuilt, quantizer loss, tokens, vectors.

        rebuilt: (B, 3, H, W). The loss, a scalar, is || f - f_hat || of (5), averaged over the
        partial sums f_hat_k. Its first term trains phi (in the release also the codebook), its
        second, the commitment loss with weight 0.25, pulls f towards the codes. tokens (B, L) and
        vectors (B, L, z) are for Quantizer.update. Source of loss and weight: the release.
        """
        f = self.to_latent(images)                                          # (B, z, P, P)
        K, tokens, vectors = len(self.patch_nums), [], []
        # Scale dropout (TiTok, XQGAN): some images are rebuilt from their first n scales alone,
        # so that the coarse scales carry a usable image by themselves.
        chance = torch.rand(len(f), device=f.device)
        stop = (torch.rand(len(f), device=f.device) * (K - 1)).long()
        last = torch.where(chance < self.scale_dropout, stop, K - 1)        # (B,)
        f_hat, loss = f, 0.
        for k, (r_k, v_k, f_k) in enumerate(self.quantize.algorithm1(f)):
            codebook_loss = F.mse_loss(f_k, f.detach())
            commitment_loss = F.mse_loss(f_k.detach(), f)
            loss = loss + (codebook_loss + 0.25 * commitment_loss) / K
            f_hat = torch.where((k <= last).view(-1, 1, 1, 1), f_k, f_hat)
            tokens.append(r_k)
            vectors.append(v_k)
        # Straight-through estimator: the decoder sees f_hat, and its gradient passes on to f.
        rebuilt = self.to_image(f + (f_hat - f).detach())
        return rebuilt, loss, torch.cat(tokens, dim=1), torch.cat(vectors, dim=1)

    @classmethod
    def from_state_dict(cls, weights, patch_nums):
        """The model whose sizes the shapes in a state dict show, with these weights.

        Raises KeyError or RuntimeError if they are not those of a tokenizer.
        """
        ch = len(weights['encoder.conv_in.weight'])
        V, z = weights['quantize.embedding.weight'].shape
        phi_count = sum('qresi_ls' in name for name in weights) // 2
        convs = [name for name in weights
                 if name.startswith('encoder.down.') and name.endswith('.conv1.weight')]
        ch_mult = {name.split('.')[2]: len(weights[name]) // ch for name in convs}  # of each level
        vae = cls(patch_nums, V, z, ch, tuple(ch_mult.values()), phi_count,
                  res_blocks=len(convs) // len(ch_mult),
                  normalise='encoder.norm_out.weight' in weights)
        # Counts of another number of scales do not fit.
        if len(weights['quantize.ema_vocab_hit_SV']) != len(patch_nums):
            weights = {**weights, 'quantize.ema_vocab_hit_SV': vae.quantize.ema_vocab_hit_SV}
        vae.load_state_dict(weights)
        return vae


# ---- Errors and files ----


class UserError(Exception):
    """One line that says what is wrong and what to do. The commands print it and exit with 2."""


@contextmanager
def explain(what, exceptions, hint=''):
    """Turns the named exceptions into a UserError: what failed, the exception's own message, and a
    hint what to do. The original exception stays chained to it."""
    try:
        yield
    except exceptions as e:
        lines = str(getattr(e, 'strerror', None) or e).split('\n')
        reason = ' '.join(line.strip() for line in lines[:2]).strip().rstrip('.:')
        message = f'{what}: {reason or type(e).__name__}'
        raise UserError(f'{message}; {hint}' if hint else message) from e


def write_file(path, write):
    """Calls write(file) on a temporary file and renames it to path, which therefore holds either
    its old or its new content, never a part. UserError where the disk refuses."""
    path = Path(path)
    part = path.with_name(f'.{path.name}.part')             # in the same folder, or no rename works
    with explain(f'cannot write {path}', (OSError, RuntimeError, ValueError)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, 'wb') as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())                        # or a crash could leave an empty file
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


# ---- Image files <-> tensors ----

# What Pillow raises for files that are damaged, too large, or no images (found by the fuzz test).
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError,
              AttributeError, MemoryError, RuntimeError, struct.error, Image.DecompressionBombError,
              Image.DecompressionBombWarning)


def to_8_bits(image):
    """A PIL image of 16-bit or float grey values -> 8 bits. ValueError for other value ranges.

    The factor depends on the mode alone, so that all images of a folder get the same one.
    """
    grey = np.asarray(image).astype(np.float64)
    top = 1. if image.mode == 'F' else 65535.
    if not (0 <= grey.min() and grey.max() <= top):
        raise ValueError(f'values from {grey.min():g} to {grey.max():g}, expected 0 to {top:g}')
    return Image.fromarray(np.uint8(grey * (255 / top) + 0.5))


def open_image(path, size):
    """An image file as an RGB PIL image, upright. A JPEG may be decoded smaller, not below `size`.

    Transparency is put on white; of an animation the first frame is used.
    Raises UserError if Pillow cannot read the whole of it.
    """
    path = os.fsdecode(path)
    with explain(f'cannot read {path}', UNREADABLE), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.draft('RGB', (2 * size, 2 * size))        # lets the JPEG decoder skip detail
            image = ImageOps.exif_transpose(image)          # cameras note which side is up
            if image.mode[0] in 'IF':                       # convert() would clip them at 255
                image = to_8_bits(image)
            if image.has_transparency_data:
                white = Image.new('RGBA', image.size, 'white')
                image = Image.alpha_composite(white, image.convert('RGBA'))
            return image.convert('RGB')


def crop(image, size, short=None, rng=None):
    """A square of a PIL image as uint8 (size, size, 3).

    The shorter side is first resized to `short` pixels (default: size) by Lanczos. The square is
    the centre or, with a numpy generator, a random one.
    """
    scale = (short or size) / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.LANCZOS)
    room = np.array(image.size) - size
    x, y = rng.integers(room + 1) if rng else room // 2
    return np.array(image.crop((x, y, x + size, y + size)))


def to_tensor(arrays):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(images, others):
    """PSNR in dB of each image: (B, 3, H, W) in [-1, 1], twice -> (B,)."""
    mse = (images - others).square().mean((1, 2, 3))
    return -10 * (mse / 4).clamp_min(1e-10).log10()                 # peak to peak is 2


def to_uint8(images):
    """(B, 3, H, W) in [0, 1] -> uint8 (B, H, W, 3), floor(255 x + 0.5) as evaluators expect."""
    return (images.float() * 255 + 0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def batch_size(image_size):
    """Images per pass where no gradients are needed: 50 up to 128 px, 16 at 256 px, 4 at 512 px.

    By calculation: keys and values of a guided image take 0.31 GB for d30 at 256 px, and 1.5 GB for
    d36 at 512 px, in 16 bits; an activation of the encoder 42 MB and 168 MB in float32.
    """
    return {256: 16, 512: 4}.get(image_size, 50)


def make_grid(rows):
    """Rows of uint8 images (n, H, W, 3), two white pixels apart, as a PIL image."""
    widest = max(len(row) for row in rows)
    padded = [np.pad(row, ((0, widest - len(row)), (0, 2), (0, 2), (0, 0)), constant_values=255)
              for row in rows]                              # (widest, H + 2, W + 2, 3) each
    return Image.fromarray(np.vstack([np.hstack(row) for row in padded])[:-2, :-2])


def save_image(path, frames):
    """Writes PIL images as one file, several as an animation; the name says which format.

    Raises UserError if Pillow knows no format for the name, or the disk refuses.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f'{path}: the name does not end like an image file; use .png')
    options = {}
    if len(frames) > 1:
        durations = [300] * (len(frames) - 1) + [1500]      # the last frame stays longest, in ms
        options = dict(save_all=True, append_images=frames[1:], loop=0, duration=durations)
    write_file(path, lambda f: frames[0].save(f, kind, **options))
