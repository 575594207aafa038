"""Image files, arrays and tensors. Images are uint8 (H, W, 3) in files and arrays, and float32
(3, H, W) in [-1, 1] in the tokenizer. Letters: B images per batch, N of a set, n of a row."""
import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
import torch
from PIL import Image, ImageOps

from support.run import UserError, progress, reason, write_file


def open_image(path, size):
    """An image file as an RGB PIL image, upright. A JPEG may be decoded smaller, down to 2 `size`.
    UserError if Pillow cannot read the whole of it, or for more than 8 bits per channel.

    White shows through transparency, unless all of it is transparent. Of an animation the first
    frame is used, and colour profiles are ignored.
    """
    try:
        with Image.open(path) as image:
            # Pillow reads 16-bit colours as 8 bits, and 12-bit ones in them as nearly black.
            deep = image.mode[0] in 'IF' or re.search(';16[BLN]', str(image.tile))
            image.draft('RGB', (2 * size, 2 * size))            # lets the decoder skip detail
            image = ImageOps.exif_transpose(image)              # cameras note which side is up
        if deep:
            raise ValueError('more than 8 bits per channel: convert it to 8 bits')
        if image.has_transparency_data:
            image = image.convert('RGBA')
            if image.getextrema()[3][1] > 0:
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        return image.convert('RGB')
    except Exception as e:                                  # a damaged file can raise anything
        raise UserError(f'cannot read {path}: {reason(e)}') from e


def fit(image, side):
    """A PIL image as uint8 (h, w, 3), its shorter side resized to `side` by Lanczos. Of a long
    image the middle stays, three times as long as it is wide."""
    short = min(image.size)
    w, h = (min(length, 3 * short) for length in image.size)
    left, top = (image.width - w) / 2, (image.height - h) / 2
    size = round(w * side / short), round(h * side / short)
    return np.array(image.resize(size, Image.LANCZOS, box=(left, top, left + w, top + h)))


def crop(pixels, size, spot=(0.5, 0.5)):
    """A square (size, size, 3) of an image (h, w, 3): the centre one, or that at a spot: two
    numbers, from 0 (top, left) to below 1."""
    top, left = (int(share * (length - size + 1)) for share, length in zip(spot, pixels.shape))
    return pixels[top:top + size, left:left + size]


def read_images(items, rows, side, what='images read'):
    """Reads the images of `items` with the indices `rows`: paths, or arrays uint8 (h, w, 3).

    Yields lists of (row, uint8 (h, w, 3)), fitted to `side`. Those that cannot be read are left
    out, and the first ten are named; UserError once they are more than one, and more than one in a
    hundred of all, or none can be read.
    """
    def read(row):
        item = items[row]
        try:
            is_file = isinstance(item, str)
            return row, fit(open_image(item, side) if is_file else Image.fromarray(item), side)
        except UserError as e:
            return row, e

    failed, began = 0, time.monotonic()
    # Pillow decodes and resizes outside of the GIL.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter('ignore')                         # of Pillow, on odd files
        for start in range(0, len(rows), 500):
            found, images = list(pool.map(read, rows[start:start + 500])), []
            for row, image in found:
                if isinstance(image, UserError):
                    failed += 1
                    if failed <= 10:
                        print(f'\nleft out: {image}', flush=True)
                else:
                    images.append((row, image))
            if failed > max(1, len(rows) / 100) or failed == len(rows):
                raise UserError(f'{failed} of {start + len(found)} images cannot be read, more '
                                f'than one in a hundred of {len(rows)}: repair or remove them')
            yield images
            progress(what, start + len(found), len(rows), began)


def read_all(items, labels, side):
    """Those of a set that read_images() can read: a tuple of N images uint8 (h, w, 3), and their
    labels, int64 (N,)."""
    rows, images = zip(*chain.from_iterable(read_images(items, range(len(items)), side)))
    return images, labels[list(rows)]


def to_tensor(arrays):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3): floor(255 x + 0.5) of x in [0, 1], as
    evaluators expect."""
    images = (images.float() / 2 + 0.5) * 255 + 0.5
    return images.clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def images_per_pass(image_size):
    """Images per pass where no gradients are needed: 16 at 256 px, 4 at 512 px, 50 at most. Keys
    and values of a guided image take 0.31 GB for d30 at 256 px and 1.5 GB for d36 at 512 px."""
    return min(50, max(1, 16 * 256 ** 2 // image_size ** 2))


def make_grid(rows):
    """Rows of uint8 images (n, H, W, 3), two white pixels apart, as a PIL image."""
    widest = max(len(row) for row in rows)
    padded = [np.pad(row, ((0, widest - len(row)), (0, 2), (0, 2), (0, 0)), constant_values=255)
              for row in rows]                              # (widest, H + 2, W + 2, 3) each
    return Image.fromarray(np.vstack([np.hstack(row) for row in padded])[:-2, :-2])


def save_image(path, image):
    """Writes a PIL image as a .png. UserError if the disk refuses."""
    write_file(path, lambda f: image.save(f, 'PNG'))
