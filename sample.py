"""Samples images of chosen classes from a checkpoint.

    python sample.py                                        # ./ckpt.pt, the first ten classes
    python sample.py --ckpt ckpt.pt --cls 284               # class index or name, several, or all
    python sample.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth --cls 284 --cfg 4
    python sample.py --cls 3 --scales growing.gif           # the images growing scale by scale
    python sample.py --npz samples.npz --n 50 --cls all     # for the evaluators of FID

Paper: Section 5.1, Table 3 (guidance, top-k). Editing, rejection sampling and evaluation are in
experiments/. Letters: B images per batch, N in all, H x W pixels, K scales.
"""
import time

import numpy as np
import torch

from support.checkpoints import load
from support.images import (batch_size, image_file, image_format, make_grid, save_image,
                            to_uint8)
from support.run import (A_GUIDANCE, A_SEED, PRECISIONS, UserError, a_path, cast_linear_weights,
                         gather, make_parser, nfc, number, pick_device, precision, rank_and_world,
                         run, tell, write_file)


def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--ckpt', type=a_path, default='ckpt.pt', help='of train.py, or a released transformer')
    add('--tokenizer', type=a_path, help='a released tokenizer, for a released transformer')
    add('--cls', nargs='+', action='extend', help='class indices, names, or all [the first ten]')
    add('--n', type=number(int, 1), default=8, help='images per class [8]')
    add('--cfg', type=number(*A_GUIDANCE), help='guidance of the last scale [of the checkpoint]')
    add('--top-k', type=number(int, 0),
        help='sample from the k likeliest codes; 0: from all [of the checkpoint]')
    add('--top-p', type=number(float, 0, 1), help='nucleus sampling; 0: off [of the checkpoint]')
    add('--seed', type=number(*A_SEED), default=0,
        help='the same images for the same seed, --cls, --n and --batch')
    add('--batch', type=number(int, 1), help='images per pass [50; 16 at 256 px, 4 at 512 px]')
    add('--out', type=image_file, default='samples.png', help='the sheet, a row per class')
    add('--npz', type=a_path,
        help='a file for the evaluators of FID, shuffled, instead of the sheet')
    add('--scales', type=image_file, help='also the images growing scale by scale: a .png or .gif')
    add('--device', help='cuda or cpu [the best there is]')
    add('--precision', choices=PRECISIONS, help='[the best that the device has]')
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
        for word in filter(None, nfc(text).lower().split(',')):
            meaning.setdefault(word.strip(), []).append(i)
    meaning.update({str(i): [i] for i in range(n)})
    for i, name in enumerate(names):
        meaning[nfc(name)] = [i]                                # a folder may be called 7
    meaning['all'] = range(n)
    found = []
    for word in asked:
        indices = meaning.get(nfc(word), meaning.get(nfc(word).lower()))
        if indices is None:
            known = ', '.join([f'0 to {n - 1}', 'all', *names[:12]])
            raise UserError(f'--cls {word}: no such class; there are {known}')
        found.extend(indices)
    return found


def sheet(images, columns):
    """Images uint8 (N, H, W, 3) in rows of so many columns."""
    return make_grid(np.split(images, range(columns, len(images), columns)))


def batch_seed(seed, index):
    """The seed of a batch, from 0 to 2^63 - 1, as torch takes it."""
    return (seed + 1_000_003 * index) % 2 ** 63


@torch.no_grad()
def draw_all(vae, var, labels, places, args, options):
    """Draws an image for each label (N,), in batches that the processes share.

    Every batch has a seed of its own, so that the images are the same for any number of processes.
    Returns in the first process uint8 (N, H, W, 3), where the image of label i is at places[i], and
    with --scales (N, K, H, W, 3), the image after each scale, else None. In the others both are
    None.
    """
    (rank, world), began = rank_and_world(), time.time()
    batches = labels.split(args.batch)
    images = growing = None
    for first in range(0, len(batches), world):                 # a batch for each process
        index, part = first + rank, None
        if index < len(batches):
            with precision(var.pos_start.device, args.precision):
                drawn, tokens = var.generate(vae, batches[index], return_tokens=True,
                                             seed=batch_seed(args.seed, index), **options)
                part = [to_uint8(drawn), None]                              # (B, H, W, 3)
                if args.scales:
                    scales = [to_uint8(x / 2 + 0.5) for x in vae.decode_scales(tokens)]
                    part[1] = np.stack(scales, axis=1)                      # (B, K, H, W, 3)
        for i, part in enumerate(filter(None, gather(part) or [])):
            start = (first + i) * args.batch
            # Copied batch by batch: 50,000 images of 256 px take 10 GB.
            if images is None:
                images = np.empty((len(labels), *part[0].shape[1:]), np.uint8)
                if args.scales:
                    growing = np.empty((len(labels), *part[1].shape[1:]), np.uint8)
            at = places[start:start + args.batch]
            images[at] = part[0]
            if args.scales:
                growing[at] = part[1]
        done = min(first + world, len(batches))
        left = (time.time() - began) / done * (len(batches) - done)
        tell(f'\r{done} of {len(batches)} batches, {left:.0f} s left ', end='')
    tell('')
    return images, growing


def main():
    args = parse()
    device = pick_device(args.device)
    vae, var, ckpt = load_both(args.ckpt, args.tokenizer)
    vae, var = vae.to(device), cast_linear_weights(var, device, args.precision)
    args.batch = args.batch or batch_size(vae.image_size)
    options = dict(ckpt['sampling'])
    for name in ('cfg', 'top_k', 'top_p'):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    classes = range(min(10, var.num_classes))
    if args.cls:
        classes = classes_of(args.cls, var.num_classes, ckpt.get('classes', []),
                             ckpt.get('words', []))
    labels = torch.tensor(list(classes)).repeat_interleave(args.n)          # (N,)
    columns = args.n if len(classes) > 1 else 8
    is_gif = args.scales and args.scales.suffix.lower() == '.gif'
    # Sizes that a file cannot have fail now, not after drawing.
    side = (vae.image_size + 2) * max(columns, -(-len(labels) // columns))
    if not args.npz:
        image_format(args.out, side)
    if args.scales:
        image_format(args.scales, side if is_gif else (vae.image_size + 2) * len(labels))
    places = shuffled(len(labels), args.seed) if args.npz else np.arange(len(labels))
    images, growing = draw_all(vae, var, labels, places, args, options)
    if rank_and_world()[0] > 0:
        return
    written = args.npz or args.out
    if args.npz:
        in_places = torch.empty_like(labels)
        in_places[places] = labels
        write_npz(args.npz, images, in_places)
    else:
        save_image(args.out, [sheet(images, columns)])
    if args.scales:
        frames = [make_grid(growing)]                           # a row per image
        if is_gif:                                              # a frame per scale
            frames = [sheet(growing[:, k], columns) for k in range(len(vae.patch_nums))]
        save_image(args.scales, frames)
        written = f'{written} and {args.scales}'
    tell(f'drew {len(images)} images; wrote {written}')


if __name__ == '__main__':
    run(main)
