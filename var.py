"""VAR: a GPT-2-like transformer that predicts the next scale instead of the next token.

    var = VAR(depth=16); images = var.generate(vae, labels)        # vae: tokenizer.VQVAE

Paper (arXiv 2404.02905): Section 3.2, equation (6), Fig. 4; Section 4, equations (7) and (8);
Section 6 for editing. Where the released weights differ from it, they are followed:
- Guidance is 2.0 in Table 3 and 1.5 in the release; it grows linearly over the scales, and is
  written (1 + t) c - t u, so that t = 1.5 is 2.5 in the other convention.
- Queries and keys of "unit length" still have a learned scale a head.
- The "drop rate" of (7) is stochastic depth, linear from 0 in the first block to 0.1 d / 24.

Letters: B batch, K scales, k one of them from 0, p positions a side of a scale, l = p * p its
tokens, L tokens of all scales, w width, d depth, h heads, V codes, z code dimension.
Names of parameters are those of the released files, so that weights go both ways as they are.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

def scale_of_token(patch_nums):
    """The scale that each of the L tokens belongs to: (L,) int64, rising."""
    return torch.arange(len(patch_nums)).repeat_interleave(torch.tensor(patch_nums) ** 2)

def block_causal_mask(patch_nums):
    """The mask of Fig. 4, (L, L): 0 where token i may see token j, -inf where it may not.

    A token sees its own scale whole, and all scales before it. Scales 1 and 2 make 1 + 4 tokens:
        0 x x x x        the first scale sees itself
        0 0 0 0 0        each of the next four: the first, and the whole second
    Released files have it; Attention needs none, and is tested against it."""
    scale = scale_of_token(patch_nums)
    return torch.where(scale[:, None] < scale[None], -torch.inf, 0.)

def filter_logits(logits, top_k=0, top_p=0.0):
    """Sets all but the top_k largest of logits (..., V), then all outside the top-p set, to -inf.

    The top-p set is the smallest whose probability reaches top_p, and never empty. 0 switches
    either off; top_k above V and top_p of 1 keep everything."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits.sort(dim=-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[..., -1] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits

def norm(x):
    """LayerNorm without parameters of its own: AdaLN brings them."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)

def attend(q, k, v):
    """softmax(q k^T) v; q (B, h, l, 64), k and v (B, h, m, 64)."""
    if torch.is_grad_enabled() and q.device.type == 'cpu':
        # On a CPU forward and backward of the fused attention take 1.2 to 1.8 times as long.
        return (q @ k.transpose(2, 3)).softmax(-1) @ v                          # (B, h, l, 64)
    return F.scaled_dot_product_attention(q, k, v, scale=1)

class Attention(nn.Module):
    """Self-attention with queries and keys of unit length (Section 4), and a scale a head."""
    def __init__(self, w, heads, qk_norm):
        super().__init__()
        self.heads, self.qk_norm = heads, qk_norm
        self.mat_qkv, self.proj = nn.Linear(w, 3 * w, bias=False), nn.Linear(w, w)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(w)), nn.Parameter(torch.zeros(w))
        self.register_buffer('zero_k_bias', torch.zeros(w))     # keys have none
        if qk_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4)))

    def forward(self, x, ends, cache):
        """x (B, l, w): all scales in training, in generation one. ends: where each of them ends in
        the sequence of all. cache: keys and values of all, (2, B, h, L, 64), in generation."""
        B, l, w = x.shape
        start = ends[-1] - l
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        qkv = F.linear(x, self.mat_qkv.weight, bias).view(B, l, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, h, l, 64) each
        if self.qk_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(math.log(100)).exp()
            k = F.normalize(k, dim=-1)
        else:
            q = q / (4 * math.sqrt(q.shape[-1]))        # the ablation of Table 3, as it was run
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            cache[0, :, :, start:ends[-1]], cache[1, :, :, start:ends[-1]] = k, v
            k, v = cache
        # Fig. 4: each scale looks at what there is up to its own end. So no mask is needed, and
        # 38 % of the products of a masked (L, L) are never computed. From the last scale to the
        # first, so that keys and values shrink, and their gradients too: a third less time (d6).
        parts, lengths = [], [b - a for a, b in zip([start, *ends], ends)]
        for q_k, end in zip(q.split(lengths, dim=2)[::-1], ends[::-1]):
            k, v = k[:, :, :end], v[:, :, :end]
            parts.insert(0, attend(q_k, k, v))
        return self.proj(torch.cat(parts, dim=2).transpose(1, 2).reshape(B, l, w))

class Block(nn.Module):
    """Attention and FFN, each scaled, shifted and gated by the class: AdaLN (Section 4)."""
    def __init__(self, w, heads, drop_rate, shared_aln, qk_norm):
        super().__init__()
        self.drop_rate, self.attn = drop_rate, Attention(w, heads, qk_norm)
        self.ffn = nn.ModuleDict({'fc1': nn.Linear(w, 4 * w), 'fc2': nn.Linear(4 * w, w)})
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, w))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(w, 6 * w))

    def drop(self, modulation, noise):
        """Stochastic depth: shuts the gates of a branch for a whole picture. noise (B, 2)."""
        gates = (noise >= self.drop_rate)[..., None, None] / (1 - self.drop_rate)   # (B, 2, 1, 1)
        return *(x * gates[:, i] for i, x in enumerate(modulation[:2])), *modulation[2:]

    def forward(self, x, modulation, ends, cache=None):
        """x (B, l, w); modulation: six vectors (B, 1, w)."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        h = torch.addcmul(shift1, norm(x), 1 + scale1)                          # (B, l, w)
        x = torch.addcmul(x, self.attn(h, ends, cache), gamma1)
        h = self.ffn['fc1'](torch.addcmul(shift2, norm(x), 1 + scale2))         # (B, l, 4w)
        return torch.addcmul(x, self.ffn['fc2'](F.gelu(h, approximate='tanh')), gamma2)

class VAR(nn.Module):
    """p(r_1 .. r_K) = prod_k p(r_k | r_<k), equation (6), of token maps r_k, patch_nums[k] a side.

    depth d sets width 64 d and d heads (7). Class index num_classes stands for "no class". qk_norm
    off is an ablation of Table 3; the released models have it on.
    """
    def __init__(self, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), depth=16, num_classes=1000,
                 vocab_size=4096, z_channels=32, shared_aln=False, qk_norm=True):
        super().__init__()
        self.patch_nums, self.num_classes, self.vocab_size = (*patch_nums,), num_classes, vocab_size
        self.ends = torch.tensor(patch_nums).square().cumsum(0).tolist()        # of each scale
        self.run_block = Block.__call__         # in training; train.py may wrap it
        w, L = 64 * depth, self.ends[-1]                                                # (7)
        self.word_embed = nn.Linear(z_channels, w)
        self.class_emb = nn.Embedding(num_classes + 1, w)
        self.pos_start = nn.Parameter(torch.empty(1, patch_nums[0] ** 2, w))
        self.pos_1LC = nn.Parameter(torch.empty(1, L, w))
        self.lvl_embed = nn.Embedding(len(patch_nums), w)
        self.register_buffer('lvl_1L', scale_of_token(patch_nums)[None])
        self.register_buffer('attn_bias_for_masking', block_causal_mask(patch_nums)[None, None])
        drop = [0.1 * depth / 24 * i / max(depth - 1, 1) for i in range(depth)]         # (7)
        self.blocks = nn.ModuleList(Block(w, depth, rate, shared_aln, qk_norm) for rate in drop)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(w, 6 * w)) if shared_aln else None
        self.head_nm = nn.ModuleDict({'ada_lin': nn.Sequential(nn.SiLU(), nn.Linear(w, 2 * w))})
        self.head = nn.Linear(w, vocab_size)
        self.init_weights(w, depth)

    @torch.no_grad()
    def init_weights(self, w, depth):
        """Initial weights, by name. The gates gamma open slowly: at first a block does nothing."""
        gate = {16: 1e-3, 20: 1e-3, 24: 1e-4}.get(depth, 1e-5)
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                p.zero_()
            elif not name.endswith('scale_mul_1H11'):
                nn.init.trunc_normal_(p, std=math.sqrt(1 / (3 * w)))
            if name.endswith(('attn.proj.weight', 'fc2.weight')):
                p.div_(math.sqrt(2 * depth))     # the residual stream then does not grow with depth
            elif name == 'head.weight':
                p.mul_(0.02)                     # the first loss is that of a uniform guess, ln V
            elif name == 'head_nm.ada_lin.1.weight':
                p.mul_(0.5)
            elif name.endswith('ada_lin.1.weight'):
                p.view(6, w, w).mul_(torch.tensor([gate] * 2 + [0.5] * 4)[:, None, None])
            elif name.endswith('ada_gss'):
                p.normal_(std=w ** -0.5).mul_(torch.tensor([gate] * 2 + [0.5] * 4)[:, None])

    def positions(self):
        """Where a token is, and of which scale it is: (1, L, w), added to every input."""
        return self.pos_1LC + self.lvl_embed(self.lvl_1L)

    def modulations(self, condition):
        """What AdaLN makes of the class (B, w): six vectors a block, two of the head, (B, 1, w).

        They depend on the class alone, so generation asks for them once an image, not once a scale:
        the weights that make them are a third of all (8).
        """
        if self.shared_ada_lin:
            shared = self.shared_ada_lin(condition).unflatten(1, (1, 6, -1))    # (B, 1, 6, w)
            six = [block.ada_gss + shared for block in self.blocks]
        else:
            six = [block.ada_lin(condition).unflatten(1, (1, 6, -1)) for block in self.blocks]
        return [x.unbind(2) for x in six], self.head_nm['ada_lin'](condition)[:, None].chunk(2, -1)

    def logits(self, x, scale, shift):
        """(B, l, w) -> (B, l, V), float32."""
        return self.head(norm(x.float()) * (1 + scale) + shift).float()

    def forward(self, labels, var_input, noise=None, tokens=None):
        """Teacher forcing: the logits of all scales at once, under the block-causal mask (Fig. 4).

        labels (B,) int64; var_input (B, L - p_1^2, z) of VQVAE.var_input -> logits (B, L, V).
        tokens (B, L): instead, their cross-entropy in nats and whether they are likeliest, (B, L).
        noise: (B, 1 + 2 d) uniform draws, which decide on label dropout and stochastic depth, drawn
        here if not given. Given, a batch has one outcome however many processes share it. It
        belongs to training; in evaluation it is not used.
        """
        if self.training:
            if noise is None:
                noise = torch.rand(len(labels), 1 + 2 * len(self.blocks), device=labels.device)
            labels = labels.masked_fill(noise[:, 0] < 0.1, self.num_classes)
        condition = self.class_emb(labels)                                      # (B, w)
        blocks, head = self.modulations(condition)
        start = condition[:, None] + self.pos_start              # [s] of Fig. 4: the class
        x = torch.cat([start, self.word_embed(var_input)], dim=1) + self.positions()    # (B, L, w)
        for i, (block, modulation) in enumerate(zip(self.blocks, blocks)):
            if self.training:
                modulation = block.drop(modulation, noise[:, 1 + 2 * i:3 + 2 * i])
                x = self.run_block(block, x, modulation, self.ends)
            else:
                x = block(x, modulation, self.ends)
        if tokens is None:
            return self.logits(x, *head)                                        # (B, L, V)
        # 64 tokens at a time, with logits made anew for the backward pass: those of all, in float32
        # and several times over, cost more than that (d6, batch 16: 0.43 s an image, not 0.35).
        def grade(x, r):
            logits = self.logits(x, *head)                                      # (B, 64, V)
            loss = F.cross_entropy(logits.flatten(0, 1), r.flatten(), reduction='none')
            return loss.view(r.shape), logits.argmax(-1) == r                   # (B, 64) each

        parts = [checkpoint(grade, *pair, use_reentrant=False, preserve_rng_state=False)
                 for pair in zip(x.split(64, dim=1), tokens.split(64, dim=1))]
        return [torch.cat(each, dim=1) for each in zip(*parts)]

    @torch.no_grad()
    def generate(self, vae, labels, cfg=1.5, top_k=900, top_p=0.96, seed=None, smooth=False,
                 given=None, keep=None, return_tokens=False):
        """Draws pictures scale by scale: K forward passes, keys and values cached, no mask.

        labels: (B,) class indices; num_classes for "no class". cfg: the guidance of the last scale.
        smooth: passes on a Gumbel-softmax mixture of codes instead of those drawn ("more smooth":
        prettier, but not for FID). given, keep: Section 6, zero-shot editing: token maps (B, l) a
        scale, and a mask (p_K, p_K) that is 1 where they are kept.
        Returns images (B, 3, H, W) in [0, 1]; with return_tokens also the K token maps.
        The same seed gives the same pictures on the same kind of device.
        """
        device, B, K = self.pos_start.device, len(labels), len(self.patch_nums)
        labels = torch.as_tensor(labels, device=device)
        rng = None if seed is None else torch.Generator(device).manual_seed(seed)
        # Guidance doubles the batch: the class above, "no class" below. Without it half is saved.
        if cfg:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])
        condition = self.class_emb(labels)                                      # (2B, w)
        blocks, head = self.modulations(condition)
        caches = head[0].new_empty(len(blocks), 2, len(labels), len(blocks), self.ends[-1], 64)
        positions, f_hat, tokens = self.positions(), 0, []                      # (1, L, w)
        x = condition[:, None] + self.pos_start                                 # (2B, l, w)
        for k, (p, end) in enumerate(zip(self.patch_nums, self.ends)):
            ratio = k / max(K - 1, 1)
            x = x + positions[:, end - p * p:end]
            for block, modulation, cache in zip(self.blocks, blocks, caches):
                x = block(x, modulation, [end], cache)
            logits = self.logits(x, *head)                                      # (2B, l, V)
            if cfg:
                t = cfg * ratio
                logits = (1 + t) * logits[:B] - t * logits[B:]                  # (B, l, V)
            logits = filter_logits(logits, top_k, top_p)
            r_k = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=rng).view(B, -1)
            z_k = vae.quantize.embedding(r_k)                                   # (B, l, z)
            if smooth:
                gumbel = -torch.empty_like(logits).exponential_(generator=rng).log()
                tau = max(0.27 * (1 - 0.95 * ratio), 0.005)
                mixture = ((logits * (1 + ratio) + gumbel) / tau).softmax(-1)
                z_k = mixture @ vae.quantize.embedding.weight
            if given is not None:
                # All tokens were drawn; those to keep are replaced. The mask is cut at one half at
                # every scale, and 1x1, which is all of the picture, is always kept.
                kept = F.interpolate(keep[None, None].float(), size=(p, p), mode='bilinear') > 0.5
                kept = (kept.flatten() | (p * p < 4)).to(device)                # (l,)
                r_k = torch.where(kept, given[k], r_k)
                z_k = torch.where(kept[:, None], vae.quantize.embedding(given[k]), z_k)
            tokens.append(r_k)
            f_hat = vae.quantize.add_scale(f_hat, k, z_k)                       # (B, z, P, P)
            if k + 1 < K:
                x = self.word_embed(vae.quantize.shrink(f_hat, k + 1))               # (B, l', w)
                x = torch.cat([x, x]) if cfg else x
        images = vae.picture(f_hat).clamp(-1, 1) / 2 + 0.5
        return (images, tokens) if return_tokens else images

    @classmethod
    def from_state_dict(cls, sd):
        """The model that the shapes and the level buffer of a state dict show, with its weights.
        KeyError or RuntimeError if it is none."""
        sides = sd['lvl_1L'].flatten().bincount().sqrt().long().tolist()
        depth = sum(name.endswith('.attn.mat_qkv.weight') for name in sd)
        (V, _), (_, z) = sd['head.weight'].shape, sd['word_embed.weight'].shape
        var = cls(sides, depth, len(sd['class_emb.weight']) - 1, V, z,
                  'shared_ada_lin.1.weight' in sd, 'blocks.0.attn.scale_mul_1H11' in sd)
        var.load_state_dict(sd)
        return var

    official_state_dict = nn.Module.state_dict      # its names are those of the released files
