"""Rejection sampling (Table 1, VAR-d30-re): of several images for each label, the best is kept.

    python experiments/reject.py --rounds 4
    python experiments/reject.py --rounds 4 --npz best.npz --n 50 --cls all

The judge is the transformer itself, by the likelihood ratio log p(tokens | class) - log p(tokens |
no class). The paper's is a classifier of ImageNet.
Letters: B images per batch, N in all, K scales, l tokens of one.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support                                  # before torch: see there
import torch
import torch.nn.functional as F

from sample import draw_all, load_for_sampling, shuffled, write_images
from support.options import add_shared, at_least_1, labels_of, make_parser, new_file
from support.run import pick_device, rank_and_world, run, seed_of, tell


@torch.no_grad()
def best_of(vae, var, rounds, labels, seed, **options):
    """K token maps (B, l) for labels (B,): for each image the best of `rounds` draws, whose seeds
    follow from `seed`. options are those of VAR.generate."""
    draws, losses = [], []
    for i in range(rounds):
        maps = var.generate(vae, labels, seed=seed_of(seed, i), **options)
        if (maps[-1] < 0).any():                # the model has overflown: draw_all() says so
            return maps
        draws.append(maps)
        tokens, x = torch.cat(maps, dim=1), vae.var_input(maps)
        with_class, without = (
            F.cross_entropy(var(y, x)[0].transpose(1, 2), tokens, reduction='none').sum(1)
            for y in (labels, torch.full_like(labels, var.num_classes)))
        losses.append(with_class - without)                                 # (B,)
    best = torch.stack(losses).argmin(0)                                    # (B,)
    return [torch.stack(maps)[best, torch.arange(len(best))] for maps in zip(*draws)]


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--rounds', type=at_least_1, default=4, help='draws per image that is kept [4]')
    add('--out', type=new_file('.png'), default='best.png', help='the sheet, a row per class')
    add_shared(parser, '--ckpt', '--tokenizer', '--cls', '--n', '--seed', '--npz', '--precision',
               '--device')
    args = parser.parse_args()
    vae, var, ckpt = load_for_sampling(pick_device(args.device), args.ckpt, args.tokenizer)
    labels = labels_of(args, ckpt, range(min(10, var.num_classes)))         # (N,)
    if args.npz:
        labels = shuffled(labels, args.seed)
    generate = partial(best_of, vae, var, args.rounds, **ckpt['config']['sampling'])
    frames = draw_all(vae, generate, labels, args.seed,
                      args.precision or ckpt['config']['precision'])
    if rank_and_world()[0] == 0:
        written = write_images(args, frames[:, -1], labels)
        tell(f'drew {len(labels) * args.rounds} images, kept {len(labels)}; wrote {written}')


if __name__ == '__main__':
    run(main)
