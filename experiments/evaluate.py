"""Grades both models of a checkpoint on validation images.

    python experiments/evaluate.py                      # ckpt.pt, on the data of its training
    python experiments/evaluate.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth \
        --data ./imagenet

Tokenizer: PSNR, SSIM, L1, codebook usage (of all scales and of each), entropy of the tokens. The
reconstructions go into reconstructions.npz, for the evaluators of rFID.
Transformer (Section 5.2): loss in nats per token and token error, over all scales, of the last one,
and of each. Scales count from 0.

Letters: B images per batch, n in all, H x W pixels, V codes, K scales, l tokens of one, L of all.
"""
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.checkpoints import load                                        # noqa: E402
from support.data import read_data                                          # noqa: E402
from support.images import psnr, to_tensor, to_uint8                        # noqa: E402
from support.run import (UserError, a_path, make_parser, number,            # noqa: E402
                         pick_device, precision, run, write_file)
from train import grade_transformer, make_config                            # noqa: E402


def data_config(ckpt, size, data=None):
    """The Config that tells what a checkpoint is graded on: the data of its training, or `data`.

    size: side of its images. UserError where neither tells the data.
    """
    saved = {'size': size, **ckpt.get('config', {})}
    given = {'data': data} if data else {}
    if 'data' not in {**saved, **given}:
        raise UserError('the checkpoint does not tell its data: add --data')
    return make_config(given, saved)


def check_classes(classes, config, ckpt, var):
    """UserError unless the classes of the data are those that the transformer was trained on."""
    if len(classes) != var.num_classes or ckpt.get('classes', classes) != classes:
        raise UserError(f'--data {config.data} has other classes than the transformer')


def ssim(a, b):
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [0, 1]: (B,).

    Gaussian window of 11 pixels, sigma 1.5. On the CPU and in float64, because variances are small
    differences of large numbers.
    """
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    g = (-offsets ** 2 / 4.5).exp()
    g = g / g.sum()
    window = torch.outer(g, g).expand(3, 1, 11, 11)

    def blur(x):
        return F.conv2d(x, window, groups=3)

    a, b = a.cpu().double(), b.cpu().double()
    mean_a, mean_b = blur(a), blur(b)
    var_a = blur(a * a) - mean_a ** 2
    var_b = blur(b * b) - mean_b ** 2
    covariance = blur(a * b) - mean_a * mean_b
    numerator = (2 * mean_a * mean_b + 0.01 ** 2) * (2 * covariance + 0.03 ** 2)
    denominator = (mean_a ** 2 + mean_b ** 2 + 0.01 ** 2) * (var_a + var_b + 0.03 ** 2)
    return (numerator / denominator).mean((1, 2, 3))


@torch.no_grad()
def grade_tokenizer(vae, images, n, device, workers=0):
    """Figures of the tokenizer on n images of an ImageSet, a dict; those images rebuilt, uint8
    (n, H, W, 3); their tokens (n, L) int64 and labels (n,).

    PSNR in dB, L1 on values in [0, 1], entropy in bits. 'usage k' is the share of the codes that
    scale k could use at most: all V, or as many as it has tokens, if that is fewer. UserError if
    no image can be read.
    """
    scores, rebuilt, tokens, labels = [], [], [], []
    for batch, indices in images.load(images.centres(n), workers):
        if len(batch) == 0:
            continue
        a = to_tensor(batch.to(device))                                     # (B, 3, H, W)
        maps = vae.encode(a)                                                # K of (B, l)
        b = vae.decode(maps)                                                # (B, 3, H, W)
        decibels = psnr(a, b)                                               # (B,)
        a, b = a / 2 + 0.5, b / 2 + 0.5                                     # in [0, 1]
        l1 = (a - b).abs().mean((1, 2, 3))                                  # (B,)
        scores.append(torch.stack([decibels.cpu(), ssim(a, b).float(), l1.cpu()]))  # (3, B)
        rebuilt.append(to_uint8(b))                                         # (B, H, W, 3)
        tokens.append(torch.cat(maps, dim=1).cpu())                         # (B, L)
        labels.append(torch.from_numpy(images.labels)[indices])             # (B,)
    if not tokens:
        raise UserError('none of the images can be read')
    decibels, similarity, l1 = torch.cat(scores, dim=1).mean(1).tolist()
    tokens = torch.cat(tokens)                                              # (n, L)

    V = vae.quantize.V
    hits = vae.quantize.count(tokens.to(device)).cpu()                      # (K, V)
    usage = (hits > 0).sum(1) / hits.sum(1).clamp_max(V)                    # (K,)
    p = hits / hits.sum(1, keepdim=True)                                    # (K, V)
    entropy = torch.special.entr(p).sum(1) / math.log(2)                    # (K,), bits per token
    bits = sum(side * side * h for side, h in zip(vae.patch_nums, entropy.tolist()))
    figures = {'PSNR': decibels, 'SSIM': similarity, 'L1': l1,
               'codes used': (hits.sum(0) > 0).sum().item(), 'of': V,
               'bits per token': bits / tokens.shape[1], 'bits per image': bits}
    for k, value in enumerate(usage.tolist()):
        figures[f'usage {k}'] = value
    return figures, np.concatenate(rebuilt), tokens, torch.cat(labels)


def show(title, figures):
    print('  '.join([title, *(f'{name} {value:.4g}' for name, value in figures.items())]))


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--ckpt', type=a_path, default='ckpt.pt', help='of train.py, or a released transformer')
    add('--tokenizer', type=a_path, help='a released tokenizer, for a released transformer')
    add('--data', help='as for train.py [what the checkpoint was trained on]')
    add('--n', type=number(int, 1), default=sys.maxsize, help='validation images [all]')
    add('--out', type=a_path, default='reconstructions.npz', help='the images, rebuilt')
    add('--workers', type=number(int, 0), default=0, help='processes that read images')
    add('--device', help='cuda or cpu [the best there is]')
    args = parser.parse_args()
    device = pick_device(args.device)
    vae, var, ckpt = load(args.ckpt, args.tokenizer)
    vae = vae.to(device)
    config = data_config(ckpt, vae.image_size, args.data)
    _, val, classes, _ = read_data(config)
    with precision(device):
        figures, rebuilt, tokens, labels = grade_tokenizer(vae, val, args.n, device, args.workers)
        show('tokenizer', figures)
        write_file(args.out, lambda f: np.savez(f, arr_0=rebuilt, arr_1=labels.numpy()))
        if var is None:
            return
        check_classes(classes, config, ckpt, var)       # the tokenizer can be graded on any data
        show('transformer', grade_transformer(vae, var.to(device), tokens, labels, device))


if __name__ == '__main__':
    run(main)
