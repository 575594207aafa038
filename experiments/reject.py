"""Rejection sampling (Table 1, VAR-d30-re): of several images for each label, the best is kept.

    python experiments/reject.py --rounds 4                     # judged by the model itself
    python experiments/reject.py --rounds 4 --classifier resnet.pt2 --npz best.npz --n 50 --cls all

The judge is a classifier, as in the paper: a file of torch.export, images (B, 3, H, W) in [-1, 1]
-> logits (B, classes). Without one it is the transformer itself, by the likelihood ratio
log p(tokens | class) - log p(tokens | no class).
Letters: B images per batch, N in all, H x W pixels, K scales, l tokens of one.
"""
import logging
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support                                  # before torch: see there
import torch
import torch.nn.functional as F

from sample import draw_all, load_for_sampling, shuffled, write_images
from support.images import images_per_pass
from support.options import a_path, add_shared, at_least_1, labels_of, make_parser, new_picture
from support.run import UserError, pick_device, rank_and_world, reason, run, seed_of, tell


@torch.no_grad()
def best_of(vae, var, rounds, classifier, labels, seed, **options):
    """K token maps (B, l) for labels (B,): for each image the best of `rounds` draws, whose seeds
    follow from `seed`. options are those of VAR.generate."""
    draws, losses = [], []
    for i in range(rounds):
        maps = var.generate(vae, labels, seed=seed_of(seed, i), **options)
        if (maps[-1] < 0).any():                # the model has overflown: draw_all() says so
            return maps
        draws.append(maps)
        if classifier:
            loss = F.cross_entropy(classifier(vae.decode(maps)), labels, reduction='none')
        else:
            tokens, x = torch.cat(maps, dim=1), vae.var_input(maps)
            with_class, without = (
                F.cross_entropy(var(y, x)[0].transpose(1, 2), tokens, reduction='none').sum(1)
                for y in (labels, torch.full_like(labels, var.num_classes)))
            loss = with_class - without
        losses.append(loss)                                                 # (B,)
    best = torch.stack(losses).argmin(0)                                    # (B,)
    return [torch.stack(maps)[best, torch.arange(len(best))] for maps in zip(*draws)]


def load_classifier(path, images, num_classes):
    """The module in a file of torch.export, as a function of at most B images; `images` are any B
    on its device. It is always called for B of them, because it may have been exported for no other
    number: fewer are repeated. UserError if it does not fit."""
    logging.getLogger('torch.export').setLevel(logging.CRITICAL)    # it would log the traceback
    try:
        module = torch.export.load(path).module().to(images.device)
        found = module(images).shape[1]
    except Exception as e:                      # a damaged file can raise anything
        raise UserError(f'--classifier {path} is not of torch.export.save, or does not fit images '
                        f'{tuple(images.shape)}: {reason(e)}') from e
    if found != num_classes:
        raise UserError(f'--classifier has {found} classes, and the transformer {num_classes}')
    return lambda x: module(x[torch.arange(len(images)) % len(x)])[:len(x)]


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--rounds', type=at_least_1, default=4, help='draws per image that is kept [4]')
    add('--classifier', type=a_path, help='the judge [the transformer itself]')
    add('--out', type=new_picture, default='best.png', help='the sheet, a row per class')
    add_shared(parser, '--ckpt', '--tokenizer', '--cls', '--n', '--seed', '--npz', '--precision',
               '--device')
    args = parser.parse_args()
    device = pick_device(args.device)
    vae, var, ckpt = load_for_sampling(device, args.ckpt, args.tokenizer)
    labels = labels_of(args, ckpt, range(min(10, var.num_classes)))         # (N,)
    if args.npz:
        labels = shuffled(labels, args.seed)
    classifier, H = None, vae.image_size
    if args.classifier:
        images = torch.zeros(min(len(labels), images_per_pass(H)), 3, H, H, device=device)
        classifier = load_classifier(args.classifier, images, var.num_classes)
    generate = partial(best_of, vae, var, args.rounds, classifier, **ckpt['config']['sampling'])
    frames = draw_all(vae, generate, labels, args.seed,
                      args.precision or ckpt['config']['precision'])
    if rank_and_world()[0] == 0:
        written = write_images(args, frames[:, -1], labels)
        tell(f'drew {len(labels) * args.rounds} images, kept {len(labels)}; wrote {written}')


if __name__ == '__main__':
    run(main)
