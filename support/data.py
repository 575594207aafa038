"""What is trained on: drawn shapes, CIFAR-10, folders of images; and their tokens. `groups` are a
dict {class: items}; items are paths, or arrays uint8 (H, W, 3). Letters: N images, B of them
per pass, K scales, l tokens of one, L of all."""
import os
import tarfile
import zlib
from collections import namedtuple
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from support.checkpoints import fetch
from support.images import crop, images_per_pass, read_images, to_tensor
from support.options import BUILT_IN
from support.run import UserError, agree, gather, rank_and_world, reason, tell, write_file

# The ten shapes: which points of the unit disc belong to each. A point is a complex number x + iy,
# y downwards. A point is in the star if it is outside of at most one of the lines between the tips.
TURNS = np.exp(2j * np.pi * np.arange(5) / 5)
SHAPES = {
    'disc': lambda z: abs(z) < .9,
    'ring': lambda z: abs(abs(z) - .75) < .2,
    'square': lambda z: np.maximum(abs(z.real), abs(z.imag)) < .7,
    'triangle': lambda z: (z.imag < .5) & (1.73 * abs(z.real) < z.imag + 1),
    'heart': lambda z: (1.44 * abs(z) ** 2 - 1) ** 3 < -2.49 * z.real ** 2 * z.imag ** 3,
    'arrow': lambda z: abs(z.real) < np.where(z.imag < -.1, z.imag + 1, .3 * (z.imag < 1)),
    'star': lambda z: sum((z * turn).imag < -.31 for turn in TURNS) < 2,
    'cross': lambda z: (abs(z) < .95) & (np.minimum(abs(z.real), abs(z.imag)) < .28),
    'crescent': lambda z: (abs(z) < .95) & (abs(z - .45) > .8),
    'stripes': lambda z: (abs(z) < .95) & (abs(abs(z.imag) - .35) > .17)}


def shapes(n, size=32, seed=0):
    """Ten kinds of drawn shapes: uint8 (n, size, size, 3) and their classes, int64 (n,).

    One of four colours on black or white. Colour, place, size and tilt are random and depend on the
    seed alone. Nine points per pixel tell how much of it is covered, so that edges are smooth.
    """
    colours = np.array([(220, 40, 40), (240, 200, 40), (50, 170, 60), (50, 90, 220)])
    inside = list(SHAPES.values())
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 1, 3 * size)
    labels = rng.integers(len(SHAPES), size=n)
    images = np.empty((n, size, size, 3), np.uint8)
    for image, label in zip(images, labels):
        front, back = rng.choice(colours), rng.choice([15, 245])
        radius, tilt = rng.uniform(.3, .42), rng.uniform(-.2, .2)
        x, y = rng.uniform(radius, 1 - radius, 2)
        points = ((grid - x) + 1j * (grid - y)[:, None]) / (radius * np.exp(1j * tilt))
        covered = inside[label](points).reshape(size, 3, size, 3).mean((1, 3))
        image[:] = back + covered[..., None] * (front - back)               # (size, size, 3)
    return images, labels


CIFAR10 = ('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
           'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')


def cifar10(path):
    """Images uint8 (60000, 32, 32, 3), labels int64 (60000,), and the classes; the last 10,000 are
    for validation. A record is a label byte and 3 x 1024 bytes of red, green and blue rows.
    UserError for a file that is not the whole of CIFAR-10."""
    names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin', 'batches.meta.txt']
    try:
        with tarfile.open(path) as tar:
            files = {Path(member.name).name: tar.extractfile(member).read() for member in tar
                     if Path(member.name).name in names}
        *batches, classes = (files[name] for name in names)
        records = np.frombuffer(b''.join(batches), np.uint8).reshape(-1, 3073)  # (60000, 3073)
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as e:
        raise UserError(f'{path} is not the whole binary CIFAR-10: delete it ({reason(e)})') from e
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, records[:, 0].astype(np.int64), classes.decode().split()


LAYOUTS = ('expected are <class>/*, or train/<class>/* with or without val/<class>/*, or images '
           'alone')
VAL_NAMES = ('val', 'valid', 'validation', 'test')              # the first one that is there
ENDINGS = ('.jpg', '.jpeg', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff', '.avif')


def list_images(folder):
    """The images in a folder and in its images/: sorted paths."""
    return sorted(os.path.join(place, name) for place in (folder, folder / 'images')
                  if place.is_dir() for name in os.listdir(place)
                  if name.lower().endswith(ENDINGS) and not name.startswith('.'))


def list_folders(folder):
    return [path for path in folder.glob('[!.]*') if path.is_dir()]


def list_classes(folder):
    """The groups of a folder: {class: paths} of its class folders, sorted by name, or by number if
    all are numbers; {'images': paths} where images lie in it alone; {} for anything else."""
    found = {path.name: list_images(path) for path in list_folders(folder)}
    names = sorted(name for name, paths in found.items() if paths and name != 'images')
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    images = list_images(folder)
    return {name: found[name] for name in names} or ({'images': images} if images else {})


def hold_out(groups):
    """Splits groups for validation, by a hash of the class and the name of an image: about one in
    ten is held out, and stays so when others come; of a class of two or more, at least one is, and
    not all are."""
    train, val = {}, {}
    for name, paths in groups.items():
        hashes = {path: zlib.crc32(f'{name}/{os.path.basename(path)}'.encode()) for path in paths}
        ranked = sorted(paths, key=hashes.get)
        n = sum(value < 2 ** 32 / 10 for value in hashes.values())
        n = min(max(n, 1), len(paths) - 1)
        val[name], train[name] = sorted(ranked[:n]), sorted(ranked[n:])
    return train, val


def read_folder(root):
    """Groups for training and for validation, and where the latter come from. UserError for a
    folder that is not laid out as LAYOUTS say."""
    if not root.is_dir():
        raise UserError(f'--data {root}: no such folder; {LAYOUTS}')
    inside = {path.name.lower(): path for path in list_folders(root)}
    vals = [inside[name] for name in VAL_NAMES if name in inside]
    # A folder that is called train can also be a class, beside bus and truck.
    is_split = 'train' in inside and (vals or list_folders(inside['train']))
    train = list_classes(inside['train'] if is_split else root)
    if not train:
        raise UserError(f'--data {root}: no images in it, but the folders {[*inside]}; {LAYOUTS}')
    val = list_classes(vals[0]) if is_split and vals else {}
    if val and {*val} <= {*train}:
        return train, val, vals[0].name + '/'
    return *hold_out(train), 'held out'


# What a run is trained on: items (N,) and labels int64 (N,) for training and for validation, the
# names of the classes, and where the validation images come from.
Data = namedtuple('Data', 'train val classes source')


def read_data(config):
    """The Data that a config names. Opens no image of a folder. UserError if it is not there, or if
    nothing is left for training or for validation."""
    if config.data in BUILT_IN:
        if config.data == 'shapes':
            images, labels = shapes(9000, config.size)
            names, n, source = list(SHAPES), 8000, 'drawn'
        else:
            images, labels, names = cifar10(fetch(*CIFAR10))
            n, source = len(images) * 5 // 6, 'test_batch'
        sets = [{name: list(images[part][labels[part] == i]) for i, name in enumerate(names)}
                for part in (slice(n), slice(n, None))]
    else:
        *sets, source = read_folder(Path(config.data))
    classes = list(sets[0])[:config.classes or None]
    pairs = []
    for groups in sets:
        parts = [groups.get(name, [])[:config.limit or None] for name in classes]
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), [*map(len, parts)])
        pairs.append(([item for part in parts for item in part], labels))
    counts = [len(items) for items, _ in pairs]
    if 0 in counts:
        raise UserError(f'--data {config.data}: at least two images of a class are needed')
    agree(counts, 'number of images in --data')
    tell(f'{counts[0]} training and {counts[1]} validation images ({source}), {len(classes)} '
         f'classes: {", ".join(classes[:12])}')
    return Data(*pairs, classes, source)


def spread(N, n):
    """n of the indices below N, evenly spread; all of them if N is smaller."""
    n = min(n, N)
    return [i * N // n for i in range(n)]


def step_rows(n, batch, seed, start, stop):
    """For each step from start: the step, and which of n rows make its batch, (batch,) int64.

    Every epoch is one permutation of the n rows. A row depends only on its place in the run, so
    that a resumed run sees the same rows.
    """
    @lru_cache(2)                               # a batch can reach into the next epoch
    def permutation(epoch):
        return np.random.default_rng((seed, epoch)).permutation(n)

    for step in range(start, stop):
        places = range(step * batch, (step + 1) * batch)
        yield step, np.array([permutation(place // n)[place % n] for place in places])


@torch.no_grad()
def tokenize(vae, items, views, config):
    """This process's share of the tokens of all `items`, but those that cannot be read: a list of
    (index in items, tokens uint16 (L,)), in the order of items, `views` for each. The first view of
    an image is the centre crop, the others are random ones; with --flip every second is mirrored.
    """
    (rank, world), size, found = rank_and_world(), vae.image_size, []
    side, B = round(config.zoom * size), images_per_pass(size)
    for chunk in read_images(items, range(rank, len(items), world), side, 'images tokenized'):
        every = [(row, view, image) for row, image in chunk for view in range(views)]
        for start in range(0, len(every), B):
            part, crops = every[start:start + B], []
            for row, view, image in part:
                rng = np.random.default_rng((config.seed, view, row))
                pixels = crop(image, size, rng.random(2)) if view > 0 else crop(image, size)
                crops.append(pixels[:, ::-1] if config.flip and view % 2 else pixels)
            images = torch.from_numpy(np.stack(crops)).to(config.device)
            maps = vae.encode(to_tensor(images))                            # K of (B, l)
            tokens = torch.cat(maps, dim=1).cpu().numpy().astype(np.uint16)     # (B, L)
            found += [(row, r) for (row, *_), r in zip(part, tokens)]
    return found


def write_tokens(vae, sets, config):
    """tokens.npz of a run: all that stage 2 reads. sets: {name: (items, labels)}."""
    arrays = {}
    for name, (items, labels) in sets.items():
        # With --flip every second view is mirrored, so that there are at least two.
        views = max(config.views, 1 + config.flip) if name == 'train' else 1
        parts = gather(tokenize(vae, items, views, config))
        if parts:                               # the first process; the views stay in order
            rows, tokens = zip(*sorted(chain(*parts), key=itemgetter(0)))
            arrays[name], arrays[f'{name}_labels'] = np.stack(tokens), labels[[*rows]]
    if arrays:
        write_file(config.out / 'tokens.npz', lambda f: np.savez(f, **arrays))


def read_tokens(folder):
    """tokens.npz in a folder: for training and for validation, tokens uint16 (N, L) and labels
    int64 (N,). Each view of an image is a row."""
    with np.load(folder / 'tokens.npz') as f:
        return (f['train'], f['train_labels']), (f['val'], f['val_labels'])
