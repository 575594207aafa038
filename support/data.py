"""Images to train on: drawn shapes, CIFAR-10, those of folders; and their crops.

Letters: B images per batch, N images of a set.
"""
import os
import tarfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from support.checkpoints import fetch
from support.folders import class_words, read_folder
from support.images import batch_size, crop, open_image
from support.options import BUILT_IN
from support.run import UserError, rank_and_world, reason, tell

# ---- Drawn shapes ----

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


# ---- CIFAR-10 ----

CIFAR10 = ('https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz',
           'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')


def cifar10(path):
    """Training set and validation set, each uint8 (N, 32, 32, 3) and int64 (N,), and the classes.

    A record is a label byte and 3 x 1024 bytes of red, green and blue rows. The archive is read in
    memory, file by file and by name: nothing in it can be written to the disk.
    Raises UserError for a file that is not the whole of CIFAR-10.
    """
    names = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin', 'batches.meta.txt']
    try:
        with tarfile.open(path) as tar:
            files = {Path(member.name).name: tar.extractfile(member).read() for member in tar
                     if Path(member.name).name in names}
        batches = b''.join(files[name] for name in names[:6])
        records = np.frombuffer(batches, np.uint8).reshape(-1, 3073)        # (60000, 3073)
        classes = files['batches.meta.txt'].decode().split()
    except (OSError, EOFError, KeyError, ValueError, tarfile.TarError, zlib.error) as e:
        raise UserError(f'{path} is not the whole binary CIFAR-10 ({reason(e)}); delete it'
                        ) from e
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = records[:, 0].astype(np.int64)
    n = len(records) // 6                                       # the sixth batch is for validation
    return (images[:-n], labels[:-n]), (images[-n:], labels[-n:]), classes


# ---- Sets of images ----


def subset(pair, chosen, limit):
    """Items (N, ...) and labels (N,) of the chosen classes alone, at most `limit` of each (0: all).
    The labels become indices in `chosen`."""
    items, labels = pair
    rows = [np.flatnonzero(labels == c)[:limit or None] for c in chosen]
    new_labels = np.repeat(np.arange(len(chosen)), [len(part) for part in rows])
    rows = np.concatenate(rows)
    return items[rows], new_labels.astype(np.int64)


def spread(N, n):
    """n of the indices below N, evenly spread; all of them if N is smaller."""
    n = min(n, N)
    return [i * N // n for i in range(n)]


class Request(NamedTuple):
    """One crop of one image of a set.

    draw: None for the centre, or the seed of a random crop. mirror: whether it is flipped left to
    right. replace: whether another image, which draw chooses, takes the place of an unreadable one.
    """
    index: int
    draw: tuple | None = None
    mirror: bool = False
    replace: bool = False


class ImageSet(torch.utils.data.Dataset):
    """A labelled set of images: uint8 (N, H, W, 3), or file names (N,) below a folder."""
    tries = 100                 # for an image that can be read

    def __init__(self, items, labels, size, folder=''):
        self.items, self.labels, self.size, self.folder = items, labels, size, str(folder)
        self.reported = set()       # files that could not be read

    def __len__(self):
        return len(self.items)

    def path(self, index):
        return os.path.join(self.folder, os.fsdecode(self.items[index]))

    def read(self, request):
        """The crop of a Request, uint8 (size, size, 3). UserError if the file cannot be read."""
        if self.items.ndim > 1:
            image = Image.fromarray(self.items[request.index])
        else:
            image = open_image(self.path(request.index), self.size)
        rng = None if request.draw is None else np.random.default_rng(request.draw)
        pixels = crop(image, self.size, 1.125, rng)
        return pixels[:, ::-1] if request.mirror else pixels

    def __getitem__(self, request):
        """The index that was read; its crop, or None if it cannot be read; and all errors."""
        errors = []
        for attempt in range(self.tries if request.replace else 1):
            try:
                return request.index, self.read(request), errors
            except UserError as e:
                errors.append(str(e))
            if request.replace:
                other = np.random.default_rng((*request.draw, 2, attempt)).integers(len(self))
                request = request._replace(index=int(other))
        return request.index, None, errors

    def collate(self, items):
        """The readable images as an array: it comes from the workers through a pipe, where a tensor
        would come through shared memory, of which containers have little."""
        good = [(index, image) for index, image, _ in items if image is not None]
        pixels = np.empty((len(good), self.size, self.size, 3), np.uint8)
        for row, (_, image) in zip(pixels, good):
            row[:] = image
        return pixels, [index for index, _ in good], [e for *_, errors in items for e in errors]

    def load(self, batches, workers=0):
        """For each list of Requests: images (B, size, size, 3) uint8, and indices (B,) int64.

        Files that cannot be read are left out. The first ten are named.
        """
        loader = torch.utils.data.DataLoader(self, batch_sampler=batches, num_workers=workers,
                                             collate_fn=self.collate)
        for images, indices, errors in loader:
            for message in sorted({*errors} - self.reported):
                self.reported.add(message)
                if len(self.reported) <= 10:
                    print(f'left out: {message}', flush=True)
            yield torch.from_numpy(images), torch.tensor(indices, dtype=torch.int64)

    def centres(self, n, workers=0):
        """The centre crops of n images, evenly spread, in batches that fit, as load() yields them.
        UserError if none can be read."""
        chosen, B, found = spread(len(self), n), batch_size(self.size), 0
        batches = [[Request(i) for i in chosen[start:start + B]]
                   for start in range(0, len(chosen), B)]
        for images, indices in self.load(batches, workers):
            found += len(images)
            if len(images) > 0:
                yield images, indices
        if found == 0:
            raise UserError('none of the images can be read')

    def some(self, n):
        """n images, evenly spread: uint8 (n, size, size, 3) and their labels (n,)."""
        parts = list(self.centres(n))
        indices = torch.cat([indices for _, indices in parts])
        return torch.cat([images for images, _ in parts]), torch.from_numpy(self.labels)[indices]


def read_data(config):
    """Two ImageSets, for training and validation, and the classes and words for them."""
    if config.data in BUILT_IN and Path(config.data).is_dir():
        tell(f'--data {config.data} does not mean the folder of that name here: for that one, '
             f'./{config.data}')
    folder = ''
    if config.data == 'shapes':
        train, val = shapes(8000, config.size, seed=1), shapes(1000, config.size, seed=2)
        classes = list(SHAPES)
    elif config.data == 'cifar10':
        train, val, classes = cifar10(fetch(*CIFAR10))
    else:
        folder = Path(config.data)
        train, val, classes = read_folder(folder)
    if config.classes or config.limit:
        asked = config.classes or str(len(classes))
        names = classes[:int(asked)] if asked.isdecimal() else asked.split(',')
        unknown = [name for name in names if name not in classes]
        if unknown or not names:
            raise UserError(f'--classes {",".join(unknown) or asked}: there is no such class')
        chosen = [classes.index(name) for name in names]
        train, val = subset(train, chosen, config.limit), subset(val, chosen, config.limit)
        classes = names
        if not len(train[0]) or not len(val[0]):
            raise UserError('--classes: no images are left for training or validation')
    words = class_words(folder, classes) if folder else [''] * len(classes)
    train = ImageSet(*train, config.size, folder)
    val = ImageSet(*val, config.size, folder)
    return train, val, classes, words


def step_rows(n, batch, seed, start, stop):
    """For each step from start: what this process's part of the batch is made of, as pairs (row,
    place): one of n rows, and its place in the run, from 0.

    Every epoch is one permutation of the n rows. A row depends only on its place, so that a resumed
    run sees the same rows.
    """
    rank, world = rank_and_world()

    @lru_cache(2)                               # a batch can reach into the next epoch
    def permutation(epoch):
        return np.random.default_rng((seed, epoch)).permutation(n)

    for step in range(start, stop):
        first = step * batch + rank * batch // world
        places = range(first, first + batch // world)
        yield [(int(permutation(place // n)[place % n]), place) for place in places]


def random_crops(images, config, batch, start, stop):
    """For each step from start: images (B, size, size, 3) uint8 for this process. Crops and, with
    config.flip, mirroring are random. In the place of an unreadable image comes another. UserError
    if none is found."""
    def requests():
        for rows in step_rows(len(images), batch, config.seed, start, stop):
            crops = []
            for row, place in rows:
                draw = (config.seed, place)
                mirror = config.flip and np.random.default_rng((*draw, 1)).random() < 0.5
                crops.append(Request(row, draw, mirror, replace=True))
            yield crops

    for pixels, _ in images.load(requests(), config.workers):
        if len(pixels) < batch // rank_and_world()[1]:
            raise UserError(f'{images.tries} images in a row cannot be read: see the files named '
                            'above')
        yield pixels
