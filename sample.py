"""Samples images of chosen classes from a checkpoint.

    python sample.py                                        # ./ckpt.pt, the first ten classes
    python sample.py --ckpt ckpt.pt --cls 284               # class name or index, several, or all
    python sample.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth --cls 284 --cfg 4
    python sample.py --cls 3 --scales growing.png           # the images growing scale by scale
    python sample.py --npz samples.npz --n 50 --cls all     # for the evaluators of FID

Paper: equation (6) draws the tokens, Algorithm 2 makes images of them; Section 5.1; Section 7,
Table 3 (guidance, top-k). Both are in one call, VAR.generate; the rest of this file shares the
batches and writes files. Letters: B images per batch, N in all, H x W pixels, K scales.
"""
import time
from functools import partial

import support                                  # before torch: see there
import numpy as np
import torch

from support.checkpoints import load
from support.images import images_per_pass, make_grid, save_image, to_uint8
from support.options import a_count, at_least_1, chosen_labels, make_parser, new_file, number
from support.run import (UserError, autocast, gather, pick_device, progress, rank_and_world, run,
                         seed_of, tell, write_file)


@torch.no_grad()
def draw_all(vae, generate, labels, seed, precision_name=None, batch=None, scales=False):
    """Draws an image for each label (N,), in batches that the processes share: each has a seed of
    its own, so that the images are the same for any number of processes. UserError where numbers
    are not finite.

    generate(labels=, seed=) returns K token maps (B, l): VAR.generate with all else given. Returns
    uint8 (N, S, H, W, 3) in the first process, and None in the others. S is 1; with scales it is K:
    the image after each scale.
    """
    (rank, world), began = rank_and_world(), time.monotonic()
    device, H = vae.quantize.embedding.weight.device, vae.image_size
    batches = labels.split(batch or images_per_pass(H))
    frames = None
    if rank == 0:                               # 50,000 images of 256 px take 10 GB
        frames = np.empty((len(labels), len(vae.patch_nums) if scales else 1, H, H, 3), np.uint8)
    done = 0
    for first in range(0, len(batches), world):                 # a batch for each process
        index, drawn = first + rank, None
        if index < len(batches):
            with autocast(device, precision_name):
                maps = generate(labels=batches[index].to(device), seed=seed_of(seed, index))
                is_finite = bool((maps[-1] >= 0).all())         # VAR.generate
                if is_finite:
                    images = vae.decode_scales(maps) if scales else [vae.decode(maps)]
                    is_finite = bool(images[-1].isfinite().all())
            if not is_finite:
                raise UserError('the model overflows in this precision: try --precision float32')
            drawn = np.stack([to_uint8(x) for x in images], axis=1)         # (B, S, H, W, 3)
        for part in gather(drawn) or []:
            if part is not None:
                frames[done:done + len(part)] = part
                done += len(part)
        progress('batches', min(first + world, len(batches)), len(batches), began)
    return frames


def shuffled(labels, seed):
    """Labels (N,) in random order, for the evaluators of FID: they take the inception score of
    consecutive blocks, and images that are sorted by class would get a far lower one."""
    return labels[torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))]


def write_images(args, images, labels):
    """Writes images uint8 (N, H, W, 3) and labels (N,) to --npz, or as a sheet to --out. Returns
    the path."""
    if args.npz:
        arrays = {'arr_0': images, 'arr_1': labels.numpy()}
        write_file(args.npz, lambda f: np.savez(f, **arrays))
        return args.npz
    columns = args.n if len(images) > args.n else 8             # a row per class, or of eight
    rows = np.split(images, range(columns, len(images), columns))
    save_image(args.out, make_grid(rows))
    return args.out


def main():
    parser = make_parser(__doc__, '--ckpt', '--tokenizer', '--cls', '--n', '--cfg', '--seed',
                         '--npz', '--precision', '--device')
    add = parser.add_argument
    add('--top-k', type=a_count, help='from the k likeliest codes; 0: all [of the checkpoint]')
    add('--top-p', type=number(float, 0, 1), help='nucleus sampling; 0: off [of the checkpoint]')
    add('--batch', type=at_least_1, help='images per pass [50; 16 at 256 px, 4 at 512 px]')
    add('--out', type=new_file('.png'), default='samples.png', help='the sheet, a row per class')
    add('--scales', type=new_file('.png'), help='also a sheet of the images growing scale by scale')
    args = parser.parse_args()
    vae, var, ckpt = load(args.ckpt, args.tokenizer, pick_device(args.device))
    options = {**ckpt['config']['sampling'], **{
        name: value for name, value in vars(args).items()
        if name in ('cfg', 'top_k', 'top_p') and value is not None}}
    labels = chosen_labels(args, ckpt, range(min(10, var.num_classes)))     # (N,)
    if args.npz:
        labels = shuffled(labels, args.seed)
    frames = draw_all(vae, partial(var.generate, vae, **options), labels, args.seed,
                      args.precision or ckpt['config']['precision'], args.batch, bool(args.scales))
    if rank_and_world()[0] == 0:
        if args.scales:
            save_image(args.scales, make_grid(frames))          # a row per image
        written = write_images(args, frames[:, -1], labels)
        tell(f'drew {len(frames)} images; wrote {written}')


if __name__ == '__main__':
    run(main)
