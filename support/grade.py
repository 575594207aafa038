"""How good the models are: PSNR and codebook usage of a tokenizer; loss and token error of a
transformer (Section 5.2). Letters: B images per batch, n in all, H x W pixels, V codes, K scales, l
tokens of one, L of all."""
import numpy as np
import torch
import torch.nn.functional as F

from support.images import crop, images_per_pass, to_tensor


@torch.no_grad()
def grade_tokenizer(vae, chunks, device):
    """Grades the tokenizer on the centres of images: chunks are lists of (row, image), as
    read_images() yields them. Returns figures, a dict; the images' tokens, int64 (n, L); and
    their rows, a list.

    PSNR in dB. 'usage k' is the number of codes that scale k uses, divided by V, or by the number
    of its tokens in these images if that is smaller.
    """
    decibels, tokens, rows, size = [], [], [], vae.image_size
    for chunk in chunks:
        rows += [row for row, _ in chunk]
        for start in range(0, len(chunk), images_per_pass(size)):
            part = [crop(image, size) for _, image in chunk[start:start + images_per_pass(size)]]
            a = to_tensor(torch.from_numpy(np.stack(part)).to(device))      # (B, 3, H, W)
            maps = vae.encode(a)                                            # K of (B, l)
            b = vae.decode(maps)                                            # (B, 3, H, W)
            mse = (a - b).square().mean((1, 2, 3)).clamp_min(1e-10)         # (B,)
            decibels.append(-10 * (mse / 4).log10().cpu())                  # peak to peak is 2
            tokens.append(torch.cat(maps, dim=1).cpu())                     # (B, L)
    tokens = torch.cat(tokens)                                              # (n, L)

    hits = vae.quantize.count(tokens.to(device)).cpu()                      # (K, V)
    usage = (hits > 0).sum(1) / hits.sum(1).clamp_max(vae.quantize.V)       # (K,)
    figures = {'PSNR': torch.cat(decibels).mean().item(),
               'codebook usage': (hits.sum(0) > 0).float().mean().item()}
    figures |= {f'usage {k}': value for k, value in enumerate(usage.tolist())}
    return figures, tokens, rows


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
        figures |= {name: x.mean().item(), f'{name} last': per_scale[-1]}
        figures |= {f'{name} {k}': value for k, value in enumerate(per_scale)}
    return figures
