"""The multi-scale VQVAE of VAR: a picture becomes K token maps, from coarse to fine, and back.

    vae = VQVAE(); tokens = vae.encode(images); images = vae.decode(tokens)

Paper (arXiv 2404.02905): Section 3.2, Algorithms 1 and 2, equations (2) to (5).

Where it follows the released weights rather than the text: one phi_k a scale in the text, four
shared by the K scales in the weights; and phi is half its input, half a convolution of it.
Where it goes its own way, as nobody published how the released tokenizer was trained: codes are
moving averages of what they stand for, and one that dies is restarted (Quantizer.update).

Letters: B batch, H W picture, C channels, z code dimension, V codes, K scales, k one of them from
0, p positions a side of one scale, P of the last, l = p * p tokens of one scale, L of all.
Names of parameters are those of the released files, so that weights go both ways as they are.
"""
import math
from collections import OrderedDict

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

# ---- Encoder and decoder (VQGAN's, Section 4): f = E(im) of (2), im_hat = D(f_hat) of (4) ----

def conv3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)

def chain(**modules):
    """Modules that run one after another, each under its name in the released files."""
    return nn.Sequential(OrderedDict(modules))

def norm(channels):
    """Group normalisation, 32 groups where C allows it."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)

class ResBlock(nn.Module):
    """Two convolutions around a shortcut, which is a 1x1 convolution where the width changes."""
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), conv3(c_in, c_out)
        self.norm2, self.conv2 = norm(c_out), conv3(c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                                   # (B, c_out, H, W)
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class AttnBlock(nn.Module):
    """Self-attention with one head. It makes all positions depend on each other, both ways: this is
    why a raster order of tokens breaks (1), Fig. 9."""
    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.proj_out = norm(c), nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, C, H * W)
        q, k, v = qkv.transpose(2, 3).unbind(1)                                 # (B, H*W, C) each
        x_hat = (q @ k.transpose(1, 2) * C ** -0.5).softmax(-1) @ v             # (B, H*W, C)
        return x + self.proj_out(x_hat.transpose(1, 2).reshape(B, C, H, W))

class Level(nn.Module):
    """One resolution: residual blocks, at the lowest one each with attention, then the way on."""
    def __init__(self, c_in, c, blocks, attend, down=False, up=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c if i else c_in, c) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c) if attend else nn.Identity() for _ in range(blocks))
        self.downsample = self.upsample = chain()       # nothing, at the end of the way
        if down:                                        # zeros at the right and the bottom only
            self.downsample = chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, 2))
        if up:
            self.upsample = chain(enlarge=nn.Upsample(scale_factor=2), conv=conv3(c, c))

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))

def middle(c):
    return chain(block_1=ResBlock(c, c), attn_1=AttnBlock(c), block_2=ResBlock(c, c))

def make_encoder(ch, ch_mult, z, blocks):
    """(B, 3, H, W) -> (B, z, P, P), P = H / 2 ** (len(ch_mult) - 1)."""
    w, last = [ch] + [ch * m for m in ch_mult], len(ch_mult) - 1
    levels = [Level(w[i], w[i + 1], blocks, i == last, down=i < last) for i in range(last + 1)]
    return chain(conv_in=conv3(3, ch), down=nn.Sequential(*levels), mid=middle(w[-1]),
                 norm_out=norm(w[-1]), silu=nn.SiLU(), conv_out=conv3(w[-1], z))

def make_decoder(ch, ch_mult, z, blocks):
    """The mirror, with a residual block a level more; level 0 is the finest, and runs last."""
    w, last = [ch * m for m in ch_mult], len(ch_mult) - 1
    levels = {str(i): Level(w[min(i + 1, last)], w[i], blocks + 1, i == last, up=i > 0)
              for i in range(last, -1, -1)}
    return chain(conv_in=conv3(z, w[-1]), mid=middle(w[-1]), up=chain(**levels),
                 norm_out=norm(w[0]), silu=nn.SiLU(), conv_out=conv3(w[0], 3))

# ---- The multi-scale quantizer: equation (3), Algorithms 1 and 2 ----

def all_processes(x):
    """x (B, ...) of every process, one after another: the whole batch."""
    if not dist.is_initialized():
        return x
    parts = [x.new_empty(x.shape) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)

class Quantizer(nn.Module):
    """One codebook for all scales, the phi convolutions, and the step that everything shares.

    Algorithm 1 takes phi_k(z_k) off f, Algorithm 2 adds it to f_hat. Both are `add_scale` here: the
    residual of Algorithm 1 is f - f_hat, f_hat being what Algorithm 2 has so far. Codes are
    compared and summed without autocast, in float32, as in the released tokenizer.
    """
    dead_below = 0.02       # of the average use: a code that is used less is dead, and restarted

    def __init__(self, patch_nums, V, z, share):
        super().__init__()
        self.patch_nums, self.V, K = tuple(patch_nums), V, len(patch_nums)
        self.embedding = nn.Embedding(V, z).requires_grad_(False)               # see update()
        convs = nn.ModuleList(conv3(z, z) for _ in range(share))
        for conv in convs:                                          # phi starts as the identity
            nn.init.dirac_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.quant_resi = nn.ModuleDict({'qresi_ls': convs})
        # Moving counts of the hits of each code a scale. The released file has them too. All zero
        # means that no code was ever used: the first update restarts them all.
        self.register_buffer('ema_vocab_hit_SV', torch.zeros(K, V))
        # Scale k takes the convolution whose tick is nearest to k / (K - 1), the first in a tie;
        # numpy's float64 settles the ties of K = 10 as it did for the released weights.
        edge = 1 / 12 if share == 4 else 1 / 2 / share
        ticks = np.linspace(edge, 1 - edge, share)
        self.phi_of_scale = [int(np.abs(ticks - k / max(K - 1, 1)).argmin()) for k in range(K)]

    def shrink(self, f, k):
        """f (B, z, P, P) at the size of scale k, by area interpolation: (B, l, z)."""
        # Apple's mps has no area interpolation to sizes that do not divide P.
        z_k = F.interpolate(f.cpu() if f.is_mps else f, self.patch_nums[k], mode='area')
        return z_k.flatten(2).transpose(1, 2).to(f.device)

    def add_scale(self, f_hat, k, z_k):
        """f_hat + phi_k(interpolate(z_k, h_K, w_K)): a turn of Algorithm 2.

        f_hat (B, z, P, P): the sum over the scales before k, at first 0. z_k (B, l, z): embeddings.
        Algorithm 1, the teacher-forcing input and generation call it too.
        """
        p, P = self.patch_nums[k], self.patch_nums[-1]
        phi = self.quant_resi['qresi_ls'][self.phi_of_scale[k]]
        h = z_k.float().transpose(1, 2).unflatten(2, (p, p))                    # (B, z, p, p)
        with torch.autocast(h.device.type, enabled=False):
            h = F.interpolate(h, P, mode='bicubic') if p != P else h            # (B, z, P, P)
            return f_hat + 0.5 * h + 0.5 * phi(h)

    def nearest(self, x):
        """(3): argmin_v |x - e_v| for x (B, l, z); the same v maximises x.e_v - |e_v|^2 / 2."""
        codes = self.embedding.weight
        with torch.autocast(x.device.type, enabled=False):
            score = torch.addmm(codes.square().sum(1) / -2, x.flatten(0, 1), codes.T)
        return score.argmax(1).view(x.shape[:2])

    def algorithm1(self, f):
        """Algorithm 1, scale by scale, for f (B, z, P, P): yields tokens r_k (B, l), the vectors
        that they stand for (B, l, z), and f_hat (B, z, P, P) up to here."""
        f_hat = torch.zeros_like(f)
        for k in range(len(self.patch_nums)):
            vectors = self.shrink((f - f_hat).detach(), k)
            r_k = self.nearest(vectors)
            f_hat = self.add_scale(f_hat, k, self.embedding(r_k))
            yield r_k, vectors, f_hat

    def algorithm2(self, tokens):
        """Algorithm 2 before the decoder: yields f_hat (B, z, P, P) after each scale of tokens."""
        f_hat = 0
        for k, r_k in enumerate(tokens):
            f_hat = self.add_scale(f_hat, k, self.embedding(r_k))
            yield f_hat

    def count(self, tokens):
        """How often each scale of K token maps (B, l) uses each code: (K, V)."""
        return torch.stack([r_k.flatten().bincount(minlength=self.V) for r_k in tokens])

    @torch.no_grad()
    def update(self, tokens, vectors, decay):
        """Moves every code to the moving average of the vectors that chose it; restarts dead ones.

        tokens (B, L), vectors (B, L, z): of all scales. With N the moving count of a code e, n and
        s the count and the sum of its vectors in this step: N' = d N + (1 - d) n and
        e' = (d N e + (1 - d) s) / N', so that e and N are all the memory that a mean needs.
        """
        tokens, vectors = all_processes(tokens), all_processes(vectors.float())
        hits, codes, d = self.ema_vocab_hit_SV, self.embedding.weight, decay
        (K, V), device = hits.shape, codes.device
        sizes = torch.tensor(self.patch_nums, device=device) ** 2
        n = self.count(tokens.split(sizes.tolist(), dim=1))                                 # (K, V)
        s = torch.zeros_like(codes).index_add_(0, tokens.flatten(), vectors.flatten(0, 1))
        before = d * hits.sum(0)                                                            # (V,)
        hits.copy_(d * hits + (1 - d) * n)
        N = hits.sum(0)
        codes.copy_((before[:, None] * codes + (1 - d) * s) / N.clamp_min(1e-9)[:, None])
        # A dead code becomes a random vector, of each scale as often as of any other: of all
        # vectors only 1 in L is of the first, and it would collapse.
        of = torch.arange(V, device=device) % K
        place = (torch.rand(V, device=device) * sizes[of]).long() + (sizes.cumsum(0) - sizes)[of]
        fresh = vectors[torch.randint(len(tokens), (V,), device=device), place]             # (V, z)
        dead = N < self.dead_below * tokens.numel() / V
        codes[dead], hits[:, dead] = fresh[dead], 0.1 * tokens.numel() / V / K

class VQVAE(nn.Module):
    """The tokenizer. patch_nums: the sides of the scales, in latent positions; the rest: its sizes.

    Images (B, 3, H, W) in [-1, 1], H = W = image_size; tokens: a list of K int64 maps (B, l).
    The defaults are the released network (109 M). A small one learns far faster with normalise off:
    60 s of autoencoding CIFAR-10 end at 20 dB with group normalisation, which makes it hard to tell
    how bright a place is, and at 25 dB without.
    """
    def __init__(self, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=4096, z_channels=32,
                 ch=160, ch_mult=(1, 1, 2, 2, 4), share_quant_resi=4, res_blocks=2, normalise=True):
        super().__init__()
        self.patch_nums, z = tuple(patch_nums), z_channels
        self.image_size = patch_nums[-1] * 2 ** (len(ch_mult) - 1)
        self.encoder = make_encoder(ch, ch_mult, z, res_blocks)
        self.decoder = make_decoder(ch, ch_mult, z, res_blocks)
        self.quant_conv, self.post_quant_conv = conv3(z, z), conv3(z, z)
        self.init_weights(normalise)
        self.quantize = Quantizer(patch_nums, vocab_size, z, share_quant_resi)
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def init_weights(self, normalise):
        """Convolutions keep the variance of what they get, and residual branches begin at 0: so
        that a network without normalisation is stable, and one with it learns faster, too."""
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
            if name.endswith(('conv2', 'proj_out')):
                nn.init.zeros_(module.weight)
            if isinstance(module, nn.GroupNorm) and not normalise:
                self.set_submodule(name, nn.Identity())

    def latent(self, images):
        """f = E(im), equation (2): (B, z, P, P), float32."""
        images = images.contiguous(memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(images)).float()

    def picture(self, f_hat):
        """im_hat = D(f_hat), equation (4): (B, 3, H, W), float32, within about [-1, 1]."""
        return self.decoder(self.post_quant_conv(f_hat)).float()

    def encode(self, images):
        """Algorithm 1: images (B, 3, H, W) in [-1, 1] -> K token maps (B, l)."""
        return [r_k for r_k, _, _ in self.quantize.algorithm1(self.latent(images))]

    def decode(self, tokens):
        """Algorithm 2: K token maps (B, l) -> images (B, 3, H, W) in [-1, 1]."""
        return self.picture([*self.quantize.algorithm2(tokens)][-1]).clamp(-1, 1)

    def decode_scales(self, tokens):
        """The picture after each scale: K images (B, 3, H, W), the last of them decode(tokens)."""
        return [self.picture(f_hat).clamp(-1, 1) for f_hat in self.quantize.algorithm2(tokens)]

    def var_input(self, tokens):
        """The transformer's input for scales 2 to K, teacher forcing: (B, L - p_1^2, z).

        For scale k that is the sum of all scales before it, shrunk to its size; not, as Fig. 4 may
        suggest, the embeddings of r_{k-1}.
        """
        sums = self.quantize.algorithm2(tokens[:-1])
        parts = [self.quantize.shrink(f_hat, k) for k, f_hat in enumerate(sums, 1)]
        nothing = self.quantize.embedding(tokens[0][:, :0])                     # where K is 1
        return torch.cat([nothing, *parts], dim=1)

    def forward(self, images, noise=None, quantized=True):
        """For training: images rebuilt (B, 3, H, W), quantizer loss, usage (tokens, vectors), which
        is what Quantizer.update takes.

        The loss is || f - f_hat || of (5), a mean over the sums f_hat_k after each scale; its other
        half, the commitment, draws f to the codes. noise (B,): uniform draws for scale dropout, by
        which a picture in ten is rebuilt from its first scales only. Not quantized: f_hat is f.
        """
        f, K, loss, usage = self.latent(images), len(self.patch_nums), 0., []
        if not quantized:
            return self.picture(f), f.new_zeros(()), None
        noise = torch.rand(len(f), device=f.device) if noise is None else noise
        last = torch.where(noise < 0.1, noise * 10 * (K - 1), K - 1).long()     # scale to stop at
        f_hat = f
        for k, (r_k, vectors, f_k) in enumerate(self.quantize.algorithm1(f)):
            loss += (F.mse_loss(f_k, f.detach()) + 0.25 * F.mse_loss(f_k.detach(), f)) / K
            f_hat = torch.where((k <= last).view(-1, 1, 1, 1), f_k, f_hat)
            usage.append((r_k, vectors))
        # Straight through: the decoder sees f_hat, and its gradient goes to f as it is.
        rebuilt = self.picture(f + (f_hat - f).detach())
        return rebuilt, loss, tuple(torch.cat(parts, dim=1) for parts in zip(*usage))

    @classmethod
    def from_state_dict(cls, sd, patch_nums):
        """The model whose shapes a state dict shows, with its weights; KeyError or RuntimeError."""
        ch, share = len(sd['encoder.conv_in.weight']), sum('qresi_ls' in name for name in sd) // 2
        convs = [n for n in sd if n.startswith('encoder.down.') and n.endswith('.conv1.weight')]
        ch_mult = {name.split('.')[2]: len(sd[name]) // ch for name in convs}       # of each level
        vae = cls(patch_nums, *sd['quantize.embedding.weight'].shape, ch, tuple(ch_mult.values()),
                  share, len(convs) // len(ch_mult), 'encoder.norm_out.weight' in sd)
        hits = sd['quantize.ema_vocab_hit_SV']
        if len(hits) != len(patch_nums):            # counted at other scales: of no use at these
            sd = {**sd, 'quantize.ema_vocab_hit_SV': vae.quantize.ema_vocab_hit_SV}
        vae.load_state_dict(sd)
        return vae

    official_state_dict = nn.Module.state_dict      # its names are those of the released files

# ---- The learned losses of equation (5) ----

class VGG16(nn.Module):
    """L_P: how far apart two pictures are in the features of a VGG-16 trained on ImageNet.

    LPIPS without its learned weights: features of five depths, of unit length at every place.
    weights: a dict, torchvision's vgg16-397923af.pth.
    """
    def __init__(self, weights):
        super().__init__()
        layers, c = [], 3
        for width in 64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0:
            layers += [conv3(c, width), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            c = width or c
        self.features = nn.Sequential(*layers).requires_grad_(False)
        self.load_state_dict({k: v for k, v in weights.items() if k.startswith('features.')})

    def forward(self, a, b):
        """Images a, b (B, 3, H, W) in [-1, 1] -> their mean distance, a scalar."""
        x, loss = torch.cat([a, b]) / 2 + 0.5, 0
        x = (x - x.new_tensor([[[0.485]], [[0.456]], [[0.406]]])) / x.new_tensor(
            [[[0.229]], [[0.224]], [[0.225]]])                  # ImageNet's mean and deviation
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):                                 # a depth ends
                f, g = F.normalize(x.float(), dim=1).chunk(2)
                loss = loss + (f - g).square().sum(1).mean() / 5
            x = layer(x)
        return loss

class PatchDiscriminator(nn.Sequential):
    """L_G: scores patches, real above and rebuilt below 0. (B, 3, H, W) -> (B, 1, H/8, W/8)."""
    def __init__(self, ch=64):
        layers = [nn.Conv2d(3, ch, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c in ch, 2 * ch:
            layers += [nn.Conv2d(c, 2 * c, 4, 2, 1), norm(2 * c), nn.LeakyReLU(0.2)]
        super().__init__(*layers, conv3(4 * ch, 1))

    def losses(self, real, fake):
        """What the decoder minimises and what the discriminator minimises: the hinge loss.

        To the first the discriminator's weights are constants, so that one optimizer serves both.
        """
        constants = {name: p.detach() for name, p in self.named_parameters()}
        fool = -torch.func.functional_call(self, constants, fake).mean()
        return fool, (F.relu(1 - self(real)) + F.relu(1 + self(fake.detach()))).mean() / 2
