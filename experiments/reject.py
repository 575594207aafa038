"""Rejection sampling (Table 1, VAR-d30-re): of several images for each label, the best is kept.

    python experiments/reject.py --rounds 4                     # judged by the model itself
    python experiments/reject.py --rounds 4 --classifier resnet.pt2 --npz best.npz --n 50 --cls all

The judge is a classifier, as in the paper: a file of torch.export, images (B, 3, H, W) in [0, 1] ->
logits (B, classes). Without one it is the transformer itself, by the likelihood ratio
log p(tokens | class) - log p(tokens | no class).

Letters: B images per batch, N in all, H x W pixels, V codes, K scales, l tokens of one, L of all.
"""
import logging
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import batch_seed, classes_of, load_both, shuffled, write_npz   # noqa: E402
from support.images import (batch_size, image_file, make_grid,              # noqa: E402
                            save_image, to_uint8)
from support.run import (A_SEED, UserError, a_path, make_parser, number,    # noqa: E402
                         pick_device, precision, reason, run)


def log_likelihood(vae, var, labels, tokens):
    """log p(r_1 .. r_K | label) of (6), for K token maps (B, l): (B,)."""
    targets = torch.cat(tokens, dim=1)                                      # (B, L)
    logits, _ = var(labels, vae.var_input(tokens))                          # (B, L, V)
    return -F.cross_entropy(logits.transpose(1, 2), targets, reduction='none').sum(1)


@torch.no_grad()
def best_of(vae, var, labels, rounds, seed, classifier=None, **options):
    """Images (B, 3, H, W) in [0, 1] for labels (B,): for each, the best of `rounds` draws.

    Round i has the seed seed + i. options are those of VAR.generate. UserError if the classifier
    does not take these images, or lacks a class.
    """
    draws, scores = [], []
    for i in range(rounds):
        images, tokens = var.generate(vae, labels, seed=seed + i, return_tokens=True, **options)
        if classifier is None:
            nobody = torch.full_like(labels, var.num_classes)
            with_class = log_likelihood(vae, var, labels, tokens)
            score = with_class - log_likelihood(vae, var, nobody, tokens)   # (B,)
        else:
            try:
                score = classifier(images).log_softmax(-1).gather(1, labels[:, None])[:, 0]  # (B,)
            except Exception as e:              # a module in a file can raise anything
                raise UserError(f'--classifier does not fit images {tuple(images.shape)}: '
                                f'{reason(e)}') from e
        draws.append(images)
        scores.append(score)
    best = torch.stack(scores).argmax(0)                                    # (B,)
    return torch.stack(draws)[best, torch.arange(len(labels), device=best.device)]


def load_classifier(path, device):
    """The module in a file of torch.export. UserError for any other file."""
    logging.getLogger('torch.export').setLevel(logging.CRITICAL)    # it would log the traceback
    try:
        return torch.export.load(path).module().to(device)
    except Exception as e:                      # so can a damaged file
        raise UserError(f'--classifier {path}: {reason(e)}; it must be a file of torch.export.save'
                        ) from e


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--rounds', type=number(int, 1), default=4, help='draws per image that is kept [4]')
    add('--classifier', type=a_path, help='the judge [the transformer itself]')
    add('--ckpt', type=a_path, default='ckpt.pt', help='of train.py, or a released transformer')
    add('--tokenizer', type=a_path, help='a released tokenizer, for a released transformer')
    add('--cls', nargs='+', action='extend', help='class indices, names, or all [the first ten]')
    add('--n', type=number(int, 1), default=8, help='images per class [8]')
    add('--seed', type=number(*A_SEED), default=0, help='the same seed, the same images')
    add('--out', type=image_file, default='best.png', help='the sheet, a row per class')
    add('--npz', type=a_path, help='a file for the evaluators of FID, shuffled, instead')
    add('--device', help='cuda or cpu [the best there is]')
    args = parser.parse_args()
    device = pick_device(args.device)
    vae, var, ckpt = load_both(args.ckpt, args.tokenizer)
    vae, var = vae.to(device), var.to(device)
    classifier = load_classifier(args.classifier, device) if args.classifier else None
    classes = list(range(min(10, var.num_classes)))
    if args.cls:
        classes = classes_of(args.cls, var.num_classes, ckpt.get('classes', []),
                             ckpt.get('words', []))
    labels = torch.tensor(classes).repeat_interleave(args.n)                # (N,)
    drawn = []
    for i, part in enumerate(labels.split(batch_size(vae.image_size))):
        with precision(device):
            images = best_of(vae, var, part.to(device), args.rounds, batch_seed(args.seed, i),
                             classifier, **ckpt['sampling'])
        drawn.append(to_uint8(images))
    drawn = np.concatenate(drawn)                                           # (N, H, W, 3)
    if args.npz:
        order = shuffled(len(drawn), args.seed)
        write_npz(args.npz, drawn[order], labels[order])
    else:
        save_image(args.out, [make_grid(np.split(drawn, len(classes)))])
    print(f'drew {len(drawn) * args.rounds} images, kept {len(drawn)}; '
          f'wrote {args.npz or args.out}')


if __name__ == '__main__':
    run(main)
