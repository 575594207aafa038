"""How good the models are: PSNR, SSIM and codebook usage of a tokenizer; loss and token error of a
transformer (Section 5.2).

Letters: B images per batch, n in all, H x W pixels, V codes, K scales, l tokens of one, L of all.
"""
import math

import torch
import torch.nn.functional as F

from support.images import to_tensor, to_uint8


def psnr(images, others):
    """PSNR in dB of each image: (B, 3, H, W) in [-1, 1], twice -> (B,)."""
    mse = (images - others).square().mean((1, 2, 3))
    return -10 * (mse / 4).clamp_min(1e-10).log10()                 # peak to peak is 2


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [-1, 1], twice: (B,).

    Gaussian window of 11 pixels, sigma 1.5, on values in [0, 1]. In float64, because variances are
    small differences of large numbers.
    """
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=a.device)
    g = (-offsets ** 2 / 4.5).exp()
    g = g / g.sum()

    def blur(x):
        x = x.unfold(2, 11, 1) @ g              # along the columns, then along the rows
        return x.unfold(3, 11, 1) @ g                                       # (B, 3, H-10, W-10)

    a = a.double() / 2 + 0.5
    b = b.double() / 2 + 0.5
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + 0.01 ** 2) * (2 * covariance + 0.03 ** 2)
    denominator = (mean_a ** 2 + mean_b ** 2 + 0.01 ** 2) * (var_a + var_b + 0.03 ** 2)
    return (numerator / denominator).mean((1, 2, 3))


@torch.no_grad()
def grade_tokenizer(vae, images, n, device, workers=0, rebuilt=None):
    """Grades the tokenizer on n images of an ImageSet. Returns figures, a dict; the images' tokens,
    (n, L) int64; and their labels (n,). Unreadable images are left out. UserError if none can be
    read.

    PSNR in dB, entropy in bits. 'usage k' is the number of codes that scale k uses, divided by V,
    or by the number of its tokens in these images if that is smaller. rebuilt: an array uint8
    (n, H, W, 3) that the reconstructions are written to.
    """
    scores, tokens, labels, done = [], [], [], 0
    for batch, indices in images.centres(n, workers):
        a = to_tensor(batch.to(device))                                     # (B, 3, H, W)
        maps = vae.encode(a)                                                # K of (B, l)
        b = vae.decode(maps)                                                # (B, 3, H, W)
        scores.append(torch.stack([psnr(a, b).cpu(), ssim(a, b).float().cpu()]))    # (2, B)
        tokens.append(torch.cat(maps, dim=1).cpu())                         # (B, L)
        labels.append(torch.from_numpy(images.labels)[indices])             # (B,)
        if rebuilt is not None:
            rebuilt[done:done + len(b)] = to_uint8(b)
        done += len(b)
    decibels, similarity = torch.cat(scores, dim=1).mean(1).tolist()
    tokens = torch.cat(tokens)                                              # (n, L)

    V = vae.quantize.V
    hits = vae.quantize.count(tokens.to(device)).cpu()                      # (K, V)
    usage = (hits > 0).sum(1) / hits.sum(1).clamp_max(V)                    # (K,)
    p = hits / hits.sum(1, keepdim=True)                                    # (K, V)
    entropy = torch.special.entr(p).sum(1) / math.log(2)                    # (K,), bits per token
    bits = sum(side * side * h for side, h in zip(vae.patch_nums, entropy.tolist()))
    figures = {'PSNR': decibels, 'SSIM': similarity,
               'codebook usage': (hits.sum(0) > 0).float().mean().item(),
               'bits per token': bits / tokens.shape[1], 'bits per image': bits}
    figures |= {f'usage {k}': value for k, value in enumerate(usage.tolist())}
    return figures, tokens, torch.cat(labels)


@torch.no_grad()
def grade_transformer(vae, var, tokens, labels, device):
    """Loss in nats per token and share of wrong tokens (Section 5.2): over all scales, for the last
    scale, and for each scale, as a dict. tokens (n, L), labels (n,)."""
    sizes = [p * p for p in var.patch_nums]
    loss = wrong = 0
    for r, label in zip(tokens.split(25), labels.split(25)):
        r, label = r.to(device), label.to(device)
        logits, _ = var(label, vae.var_input(r.split(sizes, dim=1)))        # (B, L, V)
        each = F.cross_entropy(logits.transpose(1, 2), r, reduction='none') # (B, L)
        loss = loss + each.sum(0) / len(tokens)                             # (L,)
        wrong = wrong + (logits.argmax(-1) != r).sum(0) / len(tokens)       # (L,)
    figures = {}
    for name, x in (('loss', loss), ('error', wrong)):
        per_scale = [part.mean().item() for part in x.split(sizes)]
        figures[name] = x.mean().item()
        figures[f'{name} last'] = per_scale[-1]
        for k, value in enumerate(per_scale):
            figures[f'{name} {k}'] = value
    return figures
