"""Samples images of chosen classes from a checkpoint.

    python sample.py                                        # ./ckpt.pt, the first ten classes
    python sample.py --ckpt ckpt.pt --cls 284               # class index or name, several, or all
    python sample.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth --cls 284 --cfg 4
    python sample.py --cls 3 --scales growing.gif           # the images growing scale by scale
    python sample.py --npz samples.npz --n 50 --cls all     # for the evaluators of FID

Paper: Section 5.1, Table 3 (guidance, top-k). Editing, rejection sampling and evaluation are in
experiments/. Letters: B images per batch, N in all, H x W pixels, K scales.
"""
import os
import shutil
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tokenizer import UserError, batch_size, make_grid, save_image, to_uint8, write_file
from var import (PRECISIONS, Parser, cast_linear_weights, compile_forward, load, number,
                 pick_device, precision, rank_and_world, record_generate, run, wait_for_all)


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--ckpt', type=Path, default=Path('ckpt.pt'), help='of train.py, or a released transformer')
    add('--tokenizer', type=Path, help='a released tokenizer, for a released transformer')
    add('--cls', nargs='+', action='extend', help='class indices, names, or all [the first ten]')
    add('--n', type=number(int, 1), default=8, help='images per class (default: 8)')
    add('--cfg', type=number(float, 0), help='guidance of the last scale [of the checkpoint]')
    add('--top-k', type=number(int, 0),
        help='sample from the k likeliest codes; 0: from all [of the checkpoint]')
    add('--top-p', type=number(float, 0, 1), help='nucleus sampling; 0: off [of the checkpoint]')
    add('--seed', type=number(int, 0), default=0,
        help='the same images for the same seed, --cls, --n and --batch')
    add('--smooth', action='store_true', help='nicer images, but not for FID')
    add('--batch', type=number(int, 1), help='images per pass [50; 16 at 256 px, 4 at 512 px]')
    add('--out', type=Path, default=Path('samples.png'), help='the sheet, a row per class')
    add('--png', type=Path, help='a folder, for one file per image instead of the sheet')
    add('--npz', type=Path, help='a file for the evaluators of FID, shuffled, instead of the sheet')
    add('--scales', type=Path, help='also the images growing scale by scale: a .png or .gif')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    add('--precision', choices=PRECISIONS, help='default: the best that the device has')
    add('--compile', action='store_true',
        help='torch.compile, on CUDA also a graph: for many images; other rounding')
    return parser.parse_args()


def load_both(path, tokenizer=None):
    """load(), and UserError if the checkpoint has no transformer yet."""
    vae, var, ckpt = load(path, tokenizer)
    if var is None:
        raise UserError(f'{path} has a tokenizer only: give --ckpt a transformer, or finish the '
                        'training by train.py --resume')
    return vae, var, ckpt


def shuffled(n, seed):
    """A random permutation (n,), for the images of a file for the evaluators of FID.

    They take the inception score of consecutive blocks: images that are sorted by class would get
    a far lower one.
    """
    return np.random.default_rng(seed).permutation(n)


def write_npz(path, images, labels):
    """Writes shuffled images uint8 (N, H, W, 3) and their labels (N,) for those evaluators."""
    arrays = {'arr_0': images, 'arr_1': labels.numpy()}
    write_file(path, lambda f: np.savez(f, **arrays))


def classes_of(asked, n, names, words):
    """Indices of classes that are asked for as an index below n, a name, a word, or 'all'.

    names, words: what the checkpoint calls its classes, possibly empty lists; words are lists of
    synonyms with commas, and can stand for several classes: crane. Raises UserError for an unknown
    class.
    """
    meaning = {}
    for i, text in enumerate(words):
        for word in filter(None, text.lower().split(',')):
            meaning.setdefault(word.strip(), []).append(i)
    meaning.update({str(i): [i] for i in range(n)})
    for i, name in enumerate(names):
        meaning[name] = [i]                                     # a folder may be called 7
    meaning['all'] = range(n)
    found = []
    for word in asked:
        indices = meaning.get(word, meaning.get(word.lower()))
        if indices is None:
            known = ', '.join([f'0 to {n - 1}', 'all', *names[:12]])
            raise UserError(f'--cls {word}: no such class; there are {known}')
        found.extend(indices)
    return found


@torch.no_grad()
def draw_batches(vae, var, labels, args, options, folder):
    """Draws an image for each label (N,), in batches, each stored in a file of its own in folder.

    Every batch has a seed of its own. Several processes therefore share the work, and the same
    command continues where it was interrupted.
    """
    rank, world = rank_and_world()
    device = var.pos_start.device
    batches = list(enumerate(labels.split(args.batch)))
    mine, began = batches[rank::world], time.time()
    generate = generate_full = partial(var.generate, vae, return_tokens=True, **options)
    if args.compile and device.type == 'cuda' and len(labels) >= args.batch:
        with precision(device, args.precision):
            generate_full = record_generate(var, vae, args.batch, return_tokens=True, **options)
    for done, (index, label) in enumerate(mine, start=1):
        path = folder / f'{index}.npz'
        if not path.exists():
            seed = args.seed + 1_000_003 * index
            with precision(device, args.precision):
                full = len(label) == args.batch                 # the last batch may be smaller
                images, tokens = (generate_full if full else generate)(label, seed=seed)
                arrays = {'images': to_uint8(images)}                       # (B, H, W, 3)
                if args.scales:
                    growing = [to_uint8(x / 2 + 0.5) for x in vae.decode_scales(tokens)]
                    arrays['growing'] = np.stack(growing, axis=1)           # (B, K, H, W, 3)
            write_file(path, lambda f: np.savez(f, **arrays))
        left = (time.time() - began) / done * (len(mine) - done)
        print(f'\r{done} of {len(mine)} batches, {left:.0f} s left ', end='', flush=True)
    wait_for_all()


def read_batches(folder, name, batch, places):
    """One of the arrays of all stored batches: that of image i at places[i], places (N,).

    They are copied one by one: 50,000 images of 256 px take 10 GB.
    """
    result = None
    for index, start in enumerate(range(0, len(places), batch)):
        with np.load(folder / f'{index}.npz') as f:
            part = f[name]
        if result is None:
            result = np.empty((len(places), *part.shape[1:]), part.dtype)
        result[places[start:start + batch]] = part
    return result


def main():
    args = parse()
    if args.smooth and args.scales:
        raise UserError('--scales decodes the drawn codes, which --smooth does not use: leave one '
                        'out')
    device = pick_device(args.device)
    vae, var, ckpt = load_both(args.ckpt, args.tokenizer)
    vae, var = vae.to(device), cast_linear_weights(var, device, args.precision)
    if args.compile:
        compile_forward([*vae.decoder.up, *var.blocks], device)
    args.batch = args.batch or batch_size(vae.image_size)
    options = dict(ckpt['sampling'], smooth=args.smooth)
    for name in ('cfg', 'top_k', 'top_p'):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    names = ckpt.get('classes', [])
    classes = range(min(10, var.num_classes))
    if args.cls:
        classes = classes_of(args.cls, var.num_classes, names, ckpt.get('words', []))
    labels = torch.tensor(list(classes)).repeat_interleave(args.n)          # (N,)

    key = zlib.crc32(repr((sorted(vars(args).items()), os.path.getmtime(args.ckpt))).encode())
    folder = Path(f'{args.npz or args.out}.{key:08x}')
    draw_batches(vae, var, labels, args, options, folder)
    if rank_and_world()[0] > 0:
        return
    N, written = len(labels), []
    in_order = np.arange(N)
    places = shuffled(N, args.seed) if args.npz else in_order
    images = read_batches(folder, 'images', args.batch, places)             # (N, H, W, 3)
    if args.scales:
        growing = read_batches(folder, 'growing', args.batch, in_order)     # (N, K, H, W, 3)
        frames = [make_grid(growing)]                           # a row per image
        if args.scales.suffix.lower() == '.gif':                # a frame per scale, images in a row
            frames = [make_grid([growing[:, k]]) for k in range(growing.shape[1])]
        save_image(args.scales, frames)
        written.append(args.scales)
    if args.npz:
        write_npz(args.npz, images, labels[places.argsort()])
        written.append(args.npz)
    if args.png:
        for i, place in enumerate(places):
            save_image(args.png / f'{i:06d}.png', [make_grid([images[place][None]])])
        written.append(args.png)
    if not args.npz and not args.png:
        width = args.n if len(classes) > 1 else 8
        save_image(args.out, [make_grid(np.split(images, range(width, len(images), width)))])
        written.append(args.out)
    shutil.rmtree(folder)
    print(f'\rdrew {len(images)} images; wrote', *written)


if __name__ == '__main__':
    run(main)
