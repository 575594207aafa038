"""Samples images of chosen classes from a checkpoint.

    python sample.py                                        # ./ckpt.pt, the first ten classes
    python sample.py --ckpt ckpt.pt --cls 284               # class index or name, several, or all
    python sample.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth --cls 284 --cfg 4
    python sample.py --cls 3 --scales growing.gif           # the images growing scale by scale
    python sample.py --npz samples.npz --n 50 --cls all     # for the evaluators of FID

Paper: equation (6) draws the tokens, Algorithm 2 makes images of them; Section 5.1; Section 7,
Table 3 (guidance, top-k). Editing, rejection sampling and evaluation are in experiments/. Letters:
B images per batch, N in all, H x W pixels, K scales.
"""
import time
from functools import partial

import numpy as np
import torch

from support.checkpoints import load
from support.images import batch_size, image_file, make_grid, save_image, to_uint8
from support.options import (a_count, a_path, add_shared, at_least_1, labels_of, make_parser,
                             number)
from support.run import (PRECISIONS, UserError, cast_linear_weights, gather, pick_device, precision,
                         rank_and_world, run, seed_of, tell, write_file)


def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add_shared(parser, '--ckpt', '--tokenizer', '--cls', '--n', '--cfg', '--seed', '--device')
    add('--top-k', type=a_count,
        help='sample from the k likeliest codes; 0: from all [of the checkpoint]')
    add('--top-p', type=number(float, 0, 1), help='nucleus sampling; 0: off [of the checkpoint]')
    add('--batch', type=at_least_1, help='images per pass [50; 16 at 256 px, 4 at 512 px]')
    add('--out', type=image_file, default='samples.png', help='the sheet, a row per class')
    add('--npz', type=a_path,
        help='a file for the evaluators of FID, shuffled, instead of the sheet')
    add('--scales', type=image_file, help='also the images growing scale by scale: a .png or .gif')
    add('--precision', choices=PRECISIONS, help='[the best that the device has]')
    return parser.parse_args()


def load_both(device, path, tokenizer=None, precision_name=None):
    """load(), for sampling on a device under precision() of that name. UserError if the checkpoint
    has no transformer yet."""
    vae, var, ckpt = load(path, tokenizer)
    if var is None:
        raise UserError(f'{path} has a tokenizer only: give --ckpt a transformer, or finish the '
                        'training by train.py --resume')
    return vae.to(device), cast_linear_weights(var, device, precision_name), ckpt


@torch.no_grad()
def draw_all(vae, generate, labels, seed=0, batch=None, precision_name=None, scales=False):
    """Draws an image for each label (N,), in batches that the processes share.

    generate(labels=, seed=) returns K token maps (B, l): VAR.generate with all else given. batch:
    images per pass. Every batch has a seed of its own, so that the images are the same for any
    number of processes.
    Returns uint8 (N, S, H, W, 3) in the first process, and None in the others. S is 1; with scales
    it is K: the image after each scale.
    """
    rank, world = rank_and_world()
    began = time.monotonic()
    device = vae.quantize.embedding.weight.device
    batch = batch or batch_size(vae.image_size)
    batches = labels.split(batch)
    frames = None
    if rank == 0:                               # 50,000 images of 256 px take 10 GB
        S = len(vae.patch_nums) if scales else 1
        H = vae.image_size
        frames = np.empty((len(labels), S, H, H, 3), np.uint8)
    for first in range(0, len(batches), world):                 # a batch for each process
        index = first + rank
        drawn = None
        if index < len(batches):
            with precision(device, precision_name):
                maps = generate(labels=batches[index].to(device), seed=seed_of(seed, index))
                images = vae.decode_scales(maps) if scales else [vae.decode(maps)]
                drawn = np.stack([to_uint8(x) for x in images], axis=1)     # (B, S, H, W, 3)
        for i, part in enumerate(gather(drawn) or []):
            if part is not None:
                start = (first + i) * batch
                frames[start:start + len(part)] = part
        done = min(first + world, len(batches))
        left = (time.monotonic() - began) / done * (len(batches) - done)
        tell(f'\r{done} of {len(batches)} batches, {left:.0f} s left ', end='')
    tell('')
    return frames


def shuffled(labels, seed):
    """Labels (N,) in random order, for a file for the evaluators of FID.

    They take the inception score of consecutive blocks: images that are sorted by class would get
    a far lower one.
    """
    return labels[torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))]


def write_npz(path, images, labels):
    """Writes images uint8 (N, H, W, 3) and their labels (N,) for those evaluators."""
    arrays = {'arr_0': images, 'arr_1': labels.numpy()}
    write_file(path, lambda f: np.savez(f, **arrays))


def sheet(images, n):
    """A grid of images uint8 (N, H, W, 3), n of each class: a row per class, or rows of eight for a
    single one."""
    columns = n if len(images) > n else 8
    return make_grid(np.split(images, range(columns, len(images), columns)))


def write_images(args, images, labels):
    """Writes images uint8 (N, H, W, 3) to --npz or, without it, as a sheet to --out. Returns the
    path."""
    if args.npz:
        write_npz(args.npz, images, labels)
        return args.npz
    save_image(args.out, [sheet(images, args.n)])
    return args.out


def main():
    args = parse()
    device = pick_device(args.device)
    vae, var, ckpt = load_both(device, args.ckpt, args.tokenizer, args.precision)
    options = dict(ckpt['sampling'])
    for name in ('cfg', 'top_k', 'top_p'):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    labels = labels_of(args, ckpt, var, range(min(10, var.num_classes)))    # (N,)
    if args.npz:
        labels = shuffled(labels, args.seed)
    generate = partial(var.generate, vae, **options)
    frames = draw_all(vae, generate, labels, args.seed, args.batch, args.precision,
                      bool(args.scales))
    if rank_and_world()[0] > 0:
        return
    images = frames[:, -1]                                                  # (N, H, W, 3)
    written = write_images(args, images, labels)
    if args.scales:
        pictures = [make_grid(frames)]                          # a row per image
        if args.scales.suffix.lower() == '.gif':                # a frame per scale
            pictures = [sheet(frames[:, k], args.n) for k in range(frames.shape[1])]
        save_image(args.scales, pictures)
        written = f'{written} and {args.scales}'
    tell(f'drew {len(images)} images; wrote {written}')


if __name__ == '__main__':
    run(main)
