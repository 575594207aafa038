"""Grades both models of a checkpoint on validation images.

    python experiments/evaluate.py                      # ckpt.pt, on the data of its training
    python experiments/evaluate.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth \
        --data ./imagenet

Tokenizer: PSNR, SSIM, codebook usage (of all scales and of each), entropy of the tokens. The
reconstructions go into reconstructions.npz, for the evaluators of rFID; their references need the
same crops, which for photographs are the middle 8/9 of the centre square, as in training.
Transformer (Section 5.2): loss in nats per token and token error, over all scales, of the last one,
and of each. Scales count from 0.
"""
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import write_npz
from support.checkpoints import class_indices, load
from support.data import read_data
from support.grade import grade_tokenizer, grade_transformer
from support.options import a_count, a_path, add_shared, at_least_1, make_config, make_parser
from support.run import (UserError, cast_linear_weights, pick_device, precision, rank_and_world,
                         run)


def data_config(ckpt, size, data=None):
    """The Config that tells what a checkpoint is graded on: the data of its training, or `data`.

    size: side of its images. UserError where neither tells the data.
    """
    saved = {'size': size, **ckpt.get('config', {})}
    given = {'data': data} if data else {}
    if 'data' not in {**saved, **given}:
        raise UserError('the checkpoint does not tell its data: add --data')
    return make_config(given, saved)


def match_classes(classes, ckpt, var):
    """The transformer's index of each class of the data: int64 (classes,). UserError where it does
    not know one of them."""
    names = ckpt.get('classes', [])
    indices = class_indices(classes, names, var.num_classes)
    unknown = [name for name, index in zip(classes, indices) if index is None]
    if unknown:
        raise UserError(f'the transformer has {var.num_classes} classes, and does not know '
                        f'{len(unknown)} of the {len(classes)} of --data: {", ".join(unknown[:5])}')
    return torch.tensor(indices)


def show(title, figures):
    print('  '.join([title, *(f'{name} {value:.4g}' for name, value in figures.items())]))


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_shared(parser, '--ckpt', '--tokenizer', '--data', '--device')
    add('--n', type=at_least_1, default=sys.maxsize, help='validation images [all]')
    add('--out', type=a_path, default='reconstructions.npz', help='the images, rebuilt')
    add('--workers', type=a_count, default=0, help='processes that read images')
    args = parser.parse_args()
    device = pick_device(args.device)
    vae, var, ckpt = load(args.ckpt, args.tokenizer)
    vae, size = vae.to(device), vae.image_size
    _, val, classes, _ = read_data(data_config(ckpt, size, args.data))
    if rank_and_world()[0] > 0:                 # the first process grades all
        return
    if var is not None:
        indices = match_classes(classes, ckpt, var)
    rebuilt = np.empty((min(args.n, len(val)), size, size, 3), np.uint8)
    with precision(device):
        figures, tokens, labels = grade_tokenizer(vae, val, args.n, device, args.workers, rebuilt)
        show('tokenizer', figures)
        write_npz(args.out, rebuilt[:len(labels)], labels)
        if var is not None:
            var = cast_linear_weights(var, device)
            figures = grade_transformer(vae, var, tokens, indices[labels], device)
            show('transformer', figures)


if __name__ == '__main__':
    run(main)
