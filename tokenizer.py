"""The multi-scale VQVAE of VAR: a picture becomes K token maps, from coarse to fine, and back.

    vae = VQVAE(); tokens = vae.encode(images); images = vae.decode(tokens)

Paper (arXiv 2404.02905): Section 3.2, Algorithms 1 and 2, equations (2) to (5).
From leaf to root: the convolutional encoder and decoder (VQGAN's, Section 4), the quantizer, which
is the paper's contribution, the model, and the two learned losses of equation (5).

Where this file follows the released weights rather than the text:
- The text has one convolution phi_k a scale; the released model shares four among its K scales.
- phi(x) mixes: half the input and half its convolution, so that it starts near the identity.
Where it goes its own way, because the training of the released tokenizer was never published:
- The codes are moving averages of what they stand for, rather than followers of a gradient, and
  a code that dies is restarted (Quantizer.update). Released codes are used as they are.

Letters: B batch, H W picture, C channels, z code dimension, V codes, K scales, k one of them from 0,
p positions a side of one scale, P of the last, l = p * p tokens of one scale, L tokens of all.
Names of parameters are those of the released files, so that weights go both ways as they are.
"""
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ----------------------------------------------------------------------------------------------
# Encoder and decoder: equations (2) and (4), f = E(im) and im_hat = D(f_hat)

def conv3(c_in, c_out, stride=1, padding=1):
    return nn.Conv2d(c_in, c_out, 3, stride, padding)


class Norm(nn.GroupNorm):
    """Group normalisation, 32 groups where C allows it."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, channels), channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.contiguous())


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution where the width changes."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = Norm(c_in), conv3(c_in, c_out)
        self.norm2, self.conv2 = Norm(c_out), conv3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention of all positions with one head: why a raster order breaks (1), see Fig. 9."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.proj_out = Norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, C, H * W)
        q, k, v = qkv.transpose(2, 3).unbind(1)                             # each (B, H*W, C)
        attention = torch.softmax(q @ k.transpose(1, 2) * C ** -0.5, dim=-1)
        return x + self.proj_out((attention @ v).transpose(1, 2).reshape(B, C, H, W))


class Downsample(nn.Module):
    """Halves each side; the zero padding is at the right and at the bottom only."""

    def __init__(self, c):
        super().__init__()
        self.conv = conv3(c, c, stride=2, padding=0)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles each side."""

    def __init__(self, c):
        super().__init__()
        self.conv = conv3(c, c)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode='nearest'))


def middle(c):
    return nn.ModuleDict({'block_1': ResBlock(c, c), 'attn_1': AttnBlock(c), 'block_2': ResBlock(c, c)})


def level(c_in, c_out, blocks, attend, **resample):
    """One resolution: residual blocks, at the lowest one each followed by attention."""
    return nn.ModuleDict({
        'block': nn.ModuleList(ResBlock(c_out if i else c_in, c_out) for i in range(blocks)),
        'attn': nn.ModuleList(AttnBlock(c_out) for _ in range(blocks * attend)), **resample})


def run_level(lvl, x):
    for i, block in enumerate(lvl['block']):
        x = block(x)
        x = lvl['attn'][i](x) if len(lvl['attn']) else x
    return x


class Encoder(nn.Module):
    """Images (B, 3, H, W) to (B, z, H / 2^(n-1), W / 2^(n-1)), n = len(ch_mult)."""

    def __init__(self, ch, ch_mult, z_channels, res_blocks):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in = conv3(3, ch)
        self.down = nn.ModuleList(
            level(widths[i - 1] if i else ch, c, res_blocks, i == last,
                  **({'downsample': Downsample(c)} if i < last else {}))
            for i, c in enumerate(widths))
        self.mid = middle(widths[-1])
        self.norm_out, self.conv_out = Norm(widths[-1]), conv3(widths[-1], z_channels)

    def forward(self, x):
        x = self.conv_in(x)
        for lvl in self.down:
            x = run_level(lvl, x)
            x = lvl['downsample'](x) if 'downsample' in lvl else x
        for block in self.mid.values():
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """The mirror of the encoder, with one residual block a level more; up[0] is the finest level."""

    def __init__(self, ch, ch_mult, z_channels, res_blocks):
        super().__init__()
        widths, last = [ch * m for m in ch_mult], len(ch_mult) - 1
        self.conv_in, self.mid = conv3(z_channels, widths[-1]), middle(widths[-1])
        self.up = nn.ModuleList(
            level(widths[min(i + 1, last)], c, res_blocks + 1, i == last,
                  **({'upsample': Upsample(c)} if i else {}))
            for i, c in enumerate(widths))
        self.norm_out, self.conv_out = Norm(ch * ch_mult[0]), conv3(ch * ch_mult[0], 3)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.mid.values():
            x = block(x)
        for lvl in reversed(self.up):
            x = run_level(lvl, x)
            x = lvl['upsample'](x) if 'upsample' in lvl else x
        return self.conv_out(F.silu(self.norm_out(x)))


# ----------------------------------------------------------------------------------------------
# The multi-scale quantizer: equation (3), Algorithms 1 and 2

def all_processes(x):
    """x (B, ...) of every process, one after another: (N B, ...), the whole batch."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def in_float32(x):
    """No autocast: the codes are compared and summed in float32, as in the released tokenizer."""
    return torch.autocast(x.device.type, enabled=False)


class Quantizer(nn.Module):
    """One codebook for all scales, the phi convolutions, and the step that everything shares.

    Algorithm 1 writes f - phi_k(z_k), Algorithm 2 f_hat + phi_k(z_k). Both are the one method
    `add_scale`: the residual of Algorithm 1 is f - f_hat, f_hat being what Algorithm 2 has so far.
    """

    def __init__(self, patch_nums, vocab_size, z_channels, share_quant_resi):
        super().__init__()
        self.patch_nums, K, n = tuple(patch_nums), len(patch_nums), share_quant_resi
        self.embedding = nn.Embedding(vocab_size, z_channels).requires_grad_(False)  # see update()
        self.quant_resi = nn.ModuleDict(
            {'qresi_ls': nn.ModuleList(conv3(z_channels, z_channels) for _ in range(n))})
        # A moving count, a scale, of how often each code was used. It weighs the moving averages
        # of the codes; the released file holds it too. All zero: no code was ever used, so the
        # first step of training restarts all of them on its own residuals.
        self.register_buffer('ema_vocab_hit_SV', torch.zeros(K, vocab_size))
        # Scale k uses the convolution whose tick is nearest to k / (K - 1); the first wins a tie.
        # numpy's float64 ticks settle the ties of K = 10 as they were settled for the released weights.
        edge = 1 / 3 / n if n == 4 else 1 / 2 / n
        ticks = np.linspace(edge, 1 - edge, n)
        self.phi_of_scale = [int(np.argmin(np.abs(ticks - k / max(K - 1, 1)))) for k in range(K)]

    def phi(self, k, x):
        return 0.5 * x + 0.5 * self.quant_resi['qresi_ls'][self.phi_of_scale[k]](x)

    def shrink(self, f, k):
        """f (B, z, P, P) to the size of scale k, (B, z, p, p), by area interpolation."""
        return F.interpolate(f, size=2 * self.patch_nums[k:k + 1], mode='area')

    def add_scale(self, f_hat, k, z_k):
        """f_hat + phi_k(interpolate(z_k)): one turn of Algorithm 2, lines 5 to 7.

        f_hat (B, z, P, P): the sum over the scales before k, a zero at first. z_k (B, l, z): the
        embeddings of scale k. Algorithm 1, the teacher-forcing input and generation call it too.
        """
        p, P = self.patch_nums[k], self.patch_nums[-1]
        z_k = z_k.transpose(1, 2).unflatten(2, (p, p))                      # (B, z, p, p)
        if p != P:
            z_k = F.interpolate(z_k, size=(P, P), mode='bicubic')           # (B, z, P, P)
        with in_float32(z_k):
            return f_hat + self.phi(k, z_k)

    def nearest(self, x):
        """Equation (3): argmin_v ||e_v - x||, for x (..., z). The same v maximises x.e_v - |e_v|^2 / 2."""
        codes = self.embedding.weight
        with in_float32(x):
            score = torch.addmm(codes.square().sum(1) / -2, x.flatten(0, -2), codes.T)
        return score.argmax(1).view(x.shape[:-1])

    def algorithm1(self, f):
        """Algorithm 1, a generator over the scales. f (B, z, P, P), float32.

        Yields tokens (B, l), the vectors that they stand for (B, l, z), and f_hat up to here.
        """
        f_hat = torch.zeros_like(f)
        for k in range(len(self.patch_nums)):
            residual = f.detach() - f_hat.detach()
            vectors = self.shrink(residual, k).flatten(2).transpose(1, 2)   # (B, l, z)
            tokens = self.nearest(vectors)                                  # (B, l)
            f_hat = self.add_scale(f_hat, k, self.embedding(tokens))
            yield tokens, vectors, f_hat

    def algorithm2(self, tokens):
        """Algorithm 2 before the decoder, a generator: f_hat (B, z, P, P) after each scale of tokens."""
        f_hat = 0
        for k, r_k in enumerate(tokens):
            f_hat = self.add_scale(f_hat, k, self.embedding(r_k))
            yield f_hat

    @torch.no_grad()
    def update(self, tokens, vectors, decay=0.98, alive=0.3):
        """Moves each code to the moving average of the vectors that chose it; restarts dead codes.

        tokens (B, L) and vectors (B, L, z), all scales together. With N a code's moving count, e the
        code, n and s the count and the sum of this step's vectors: N' = d N + (1 - d) n, and
        e' = (d N e + (1 - d) s) / N', so that the code itself is all the memory that its mean needs.
        """
        hits, codes = self.ema_vocab_hit_SV, self.embedding.weight
        (K, V), d = hits.shape, decay
        tokens, vectors = all_processes(tokens), all_processes(vectors.float())
        sizes = torch.tensor([p * p for p in self.patch_nums], device=codes.device)
        scale = torch.arange(K, device=codes.device).repeat_interleave(sizes)       # (L,)
        n = torch.bincount((scale * V + tokens).flatten(), minlength=K * V).view(K, V)
        s = torch.zeros_like(codes).index_add_(0, tokens.flatten(), vectors.flatten(0, 1))
        before = hits.sum(0)                                                        # (V,)
        N = (d * before + (1 - d) * n.sum(0)).clamp_min(1e-9)
        codes.copy_(((d * before)[:, None] * codes + (1 - d) * s) / N[:, None])
        hits.copy_(d * hits + (1 - d) * n)
        # A dead code takes a random vector, from each scale as often as from any other: of the
        # vectors themselves only one in L belongs to the first scale, and it would collapse.
        of_scale = torch.arange(V, device=codes.device) % K
        place = torch.rand(V, device=codes.device) * sizes[of_scale]
        place = (sizes.cumsum(0) - sizes)[of_scale] + place.long()
        image = torch.randint(len(tokens), (V,), device=codes.device)
        dead = N < alive
        codes[dead] = vectors[image, place][dead]
        hits[:, dead] = 1 / K


# ----------------------------------------------------------------------------------------------
# The model

class VQVAE(nn.Module):
    """The tokenizer. patch_nums: the side of each scale in latent positions; the others: its sizes.

    Images are (B, 3, H, W) in [-1, 1], tokens a list of K int64 maps (B, l). H and W are
    patch_nums[-1] * 2 ** (len(ch_mult) - 1). The defaults are the released network (109 M).
    """

    def __init__(self, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=4096, z_channels=32,
                 ch=160, ch_mult=(1, 1, 2, 2, 4), share_quant_resi=4, res_blocks=2):
        super().__init__()
        self.patch_nums = tuple(patch_nums)
        self.encoder = Encoder(ch, ch_mult, z_channels, res_blocks)
        self.decoder = Decoder(ch, ch_mult, z_channels, res_blocks)
        self.quantize = Quantizer(patch_nums, vocab_size, z_channels, share_quant_resi)
        self.quant_conv = conv3(z_channels, z_channels)
        self.post_quant_conv = conv3(z_channels, z_channels)
        # Convolutions run about twice as fast with the channels last, on CPUs and on GPUs.
        self.to(memory_format=torch.channels_last)

    @property
    def image_size(self):
        return self.patch_nums[-1] * 2 ** (len(self.encoder.down) - 1)

    def latent(self, images):
        """f = E(im), equation (2): (B, z, P, P), float32 because codes are compared in float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(images)).float()

    def picture(self, f_hat):
        """im_hat = D(f_hat), equation (4): (B, 3, H, W), clamped to [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat)).float().clamp(-1, 1)

    def encode(self, images):
        """Algorithm 1. Images (B, 3, H, W) in [-1, 1] -> list of K int64 token maps (B, l)."""
        return [tokens for tokens, _, _ in self.quantize.algorithm1(self.latent(images))]

    def decode(self, tokens):
        """Algorithm 2. List of K token maps (B, l) -> images (B, 3, H, W) in [-1, 1]."""
        *_, f_hat = self.quantize.algorithm2(tokens)
        return self.picture(f_hat)

    def decode_scales(self, tokens):
        """The picture after each scale, a list of K images (B, 3, H, W): the last is decode(tokens)."""
        return [self.picture(f_hat) for f_hat in self.quantize.algorithm2(tokens)]

    def next_input(self, f_hat, k):
        """What the transformer is given for scale k: all scales before it, summed up, at its size.

        Not the embeddings of r_{k-1}, as Fig. 4 may suggest. f_hat (B, z, P, P) -> (B, l, z).
        """
        return self.quantize.shrink(f_hat, k).flatten(2).transpose(1, 2)

    def var_input(self, tokens):
        """The teacher-forcing input of scales 2 to K. List of K token maps -> (B, L - p_1^2, z)."""
        sums = self.quantize.algorithm2(tokens[:-1])
        return torch.cat([self.next_input(f_hat, k) for k, f_hat in enumerate(sums, 1)], dim=1)

    def forward(self, images, noise=None):
        """For training: reconstruction (B, 3, H, W), quantizer loss, and what Quantizer.update needs.

        The loss is || f - f_hat || of equation (5), averaged over the sums f_hat_k after each scale;
        its second term, the commitment, draws f to the codes. noise: (B,) uniform draws for scale
        dropout, by which one picture in ten is rebuilt from its first scales only (XQGAN).
        """
        f, K = self.latent(images), len(self.patch_nums)
        noise = torch.rand(len(f), device=f.device) if noise is None else noise
        last = torch.where(noise < 0.1, noise * 10 * (K - 1), K - 1).long()         # scale to stop at
        loss, seen = 0, []
        for k, (tokens, vectors, f_k) in enumerate(self.quantize.algorithm1(f)):
            loss = loss + (F.mse_loss(f_k, f.detach()) + 0.25 * F.mse_loss(f_k.detach(), f)) / K
            f_hat = torch.where((last >= k)[:, None, None, None], f_k, f_hat) if k else f_k
            seen.append((tokens, vectors))
        # Straight through: the decoder sees f_hat, and what it sends back goes to f unchanged.
        f_hat = f + (f_hat - f).detach()
        tokens, vectors = (torch.cat(parts, dim=1) for parts in zip(*seen))
        return self.decoder(self.post_quant_conv(f_hat)).float(), loss, (tokens, vectors)

    @classmethod
    def from_state_dict(cls, sd, patch_nums):
        """The model that the shapes in a state dict show, with its weights. KeyError, RuntimeError
        if it is none."""
        V, z = sd['quantize.embedding.weight'].shape
        ch, ch_mult = sd['encoder.conv_in.weight'].shape[0], []
        while (name := f'encoder.down.{len(ch_mult)}.block.0.conv1.weight') in sd:
            ch_mult.append(sd[name].shape[0] // ch)
        share = sum(k.startswith('quantize.quant_resi.') and k.endswith('.weight') for k in sd)
        blocks = sum(k.startswith('encoder.down.0.') and k.endswith('conv1.weight') for k in sd)
        vae = cls(patch_nums, V, z, ch, ch_mult, share, blocks)
        vae.load_state_dict(sd)
        return vae

    def official_state_dict(self):
        """The state dict under the names of the released files, which are those used here."""
        return self.state_dict()


# ----------------------------------------------------------------------------------------------
# The learned losses of equation (5)

class VGG16(nn.Module):
    """L_P: the distance of two pictures in the features of VGG-16, trained on ImageNet.

    LPIPS without its learned weights: features of five depths, brought to unit length at every
    place, squared differences, averaged. `weights`: torchvision's vgg16-397923af.pth, as a dict.
    """

    def __init__(self, weights):
        super().__init__()
        self.features, at, c_in = nn.ModuleDict(), 0, 3
        for c, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convs):
                self.features[str(at)] = conv3(c_in, c)
                at, c_in = at + 2, c
            at += 1                                                         # torchvision's pooling
        self.load_state_dict({k: v for k, v in weights.items() if k.startswith('features.')})
        self.requires_grad_(False)

    def forward(self, a, b):
        """a, b (B, 3, H, W) in [-1, 1] -> scalar."""
        mean, std = ([[[m]] for m in v] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = (torch.cat([a, b]) / 2 + 0.5 - torch.tensor(mean, device=a.device)) / torch.tensor(std, device=a.device)
        loss, last = 0, -2
        for name, conv in self.features.items():
            if int(name) - last > 2:                          # a pooling lies between: a depth ends
                loss, x = loss + self.difference(x), F.max_pool2d(x, 2)
            x, last = F.relu(conv(x)), int(name)
        return (loss + self.difference(x)) / 5

    @staticmethod
    def difference(x):
        a, b = F.normalize(x.float(), dim=1).chunk(2)
        return (a - b).square().sum(1).mean()


class PatchDiscriminator(nn.Sequential):
    """L_G: tells real patches from rebuilt ones, (B, 3, H, W) -> (B, 1, H/8, W/8)."""

    def __init__(self, ch=64):
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c in (ch, 2 * ch):
            layers += [nn.Conv2d(c, 2 * c, 4, 2, 1), Norm(2 * c), nn.LeakyReLU(0.2)]
        super().__init__(*layers, conv3(4 * ch, 1))

    def losses(self, real, fake):
        """(what the decoder minimises, what the discriminator minimises), the hinge loss.

        The first sees the discriminator's weights as constants, so that one backward pass and one
        optimizer serve both.
        """
        frozen = {name: p.detach() for name, p in self.named_parameters()}
        fool = -torch.func.functional_call(self, frozen, fake).float().mean()
        judge = F.relu(1 - self(real).float()).mean() + F.relu(1 + self(fake.detach()).float()).mean()
        return fool, judge / 2
