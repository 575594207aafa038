"""Rejection sampling (Table 1, VAR-d30-re): of several images for each label, the best is kept.

    python experiments/reject.py --rounds 4                     # judged by the model itself
    python experiments/reject.py --rounds 4 --classifier resnet.pt2 --npz best.npz --n 50 --cls all

The judge is a classifier, as in the paper: a file of torch.export, images (B, 3, H, W) in [-1, 1]
-> logits (B, classes), one for each class of the transformer. Without one it is the transformer
itself, by the likelihood ratio log p(tokens | class) - log p(tokens | no class).

Letters: B images per batch, N in all, H x W pixels, V codes, K scales, l tokens of one, L of all.
"""
import logging
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import draw_all, load_both, shuffled, write_images
from support.images import image_file
from support.options import a_path, add_shared, at_least_1, labels_of, make_parser
from support.run import UserError, pick_device, rank_and_world, reason, run, seed_of


def log_likelihood(vae, var, labels, maps):
    """log p(r_1 .. r_K | label) of (6), for K token maps (B, l): (B,)."""
    targets = torch.cat(maps, dim=1)                                        # (B, L)
    logits, _ = var(labels, vae.var_input(maps))                            # (B, L, V)
    return -F.cross_entropy(logits.transpose(1, 2), targets, reduction='none').sum(1)


def classify(classifier, images, labels, num_classes):
    """log p(label | image) of a classifier: (B,). UserError if it does not take these images, or
    has other classes."""
    try:
        logits = classifier(images)                                         # (B, classes)
    except Exception as e:                      # a module in a file can raise anything
        raise UserError(f'--classifier does not fit images {tuple(images.shape)}: {reason(e)}'
                        ) from e
    if logits.shape[1] != num_classes:
        raise UserError(f'--classifier has {logits.shape[1]} classes, and the transformer '
                        f'{num_classes}')
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


@torch.no_grad()
def best_of(vae, var, rounds, classifier, labels, seed, **options):
    """K token maps (B, l) for labels (B,): for each image the best of `rounds` draws, whose seeds
    follow from `seed`. options are those of VAR.generate."""
    draws, scores = [], []
    for i in range(rounds):
        maps = var.generate(vae, labels, seed=seed_of(seed, i), **options)
        if classifier is None:
            nobody = torch.full_like(labels, var.num_classes)
            with_class = log_likelihood(vae, var, labels, maps)
            scores.append(with_class - log_likelihood(vae, var, nobody, maps))      # (B,)
        else:
            scores.append(classify(classifier, vae.decode(maps), labels, var.num_classes))
        draws.append(maps)
    best = torch.stack(scores).argmax(0)                                    # (B,)
    which = torch.arange(len(labels), device=best.device)
    return [torch.stack(maps)[best, which] for maps in zip(*draws)]


def load_classifier(path, device):
    """The module in a file of torch.export. UserError for any other file."""
    logging.getLogger('torch.export').setLevel(logging.CRITICAL)    # it would log the traceback
    try:
        return torch.export.load(path).module().to(device)
    except Exception as e:                      # a damaged file can raise anything
        raise UserError(f'--classifier {path}: {reason(e)}; it must be a file of torch.export.save'
                        ) from e


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--rounds', type=at_least_1, default=4, help='draws per image that is kept [4]')
    add('--classifier', type=a_path, help='the judge [the transformer itself]')
    add('--out', type=image_file, default='best.png', help='the sheet, a row per class')
    add('--npz', type=a_path, help='a file for the evaluators of FID, shuffled, instead')
    add_shared(parser, '--ckpt', '--tokenizer', '--cls', '--n', '--seed', '--device')
    args = parser.parse_args()
    device = pick_device(args.device)
    vae, var, ckpt = load_both(device, args.ckpt, args.tokenizer)
    classifier = load_classifier(args.classifier, device) if args.classifier else None
    labels = labels_of(args, ckpt, var, range(min(10, var.num_classes)))    # (N,)
    if args.npz:
        labels = shuffled(labels, args.seed)
    generate = partial(best_of, vae, var, args.rounds, classifier, **ckpt['sampling'])
    frames = draw_all(vae, generate, labels, args.seed)
    if rank_and_world()[0] > 0:
        return
    images = frames[:, -1]                                                  # (N, H, W, 3)
    written = write_images(args, images, labels)
    print(f'drew {len(images) * args.rounds} images, kept {len(images)}; wrote {written}')


if __name__ == '__main__':
    run(main)
