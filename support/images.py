"""Image files, arrays and tensors. Images are uint8 (H, W, 3) in files and arrays, and float32
(3, H, W) in [-1, 1] in the tokenizer."""
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from support.options import a_path
from support.run import UserError, reason, write_file


def open_image(path, size, behind='white'):
    """An image file as an RGB PIL image, upright. A JPEG may be decoded smaller, down to 2 `size`.

    `behind` is the colour that shows through transparency; of an animation the first frame is used.
    Raises UserError if Pillow cannot read the whole of it, or for more than 8 bits per channel.
    """
    path = os.fsdecode(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(path) as image:
                image.draft('RGB', (2 * size, 2 * size))    # lets the JPEG decoder skip detail
                image = ImageOps.exif_transpose(image)      # cameras note which side is up
                if image.mode[0] in 'IF':                   # convert() would clip them at 255
                    raise ValueError('16-bit and float images have to be converted to 8 bits')
                if image.has_transparency_data:
                    plain = Image.new('RGBA', image.size, behind)
                    image = Image.alpha_composite(plain, image.convert('RGBA'))
                return image.convert('RGB')
    except Exception as e:                                  # a damaged file can raise anything
        raise UserError(f'cannot read {path}: {reason(e)}') from e


def crop(image, size, zoom=1., rng=None):
    """A square of a PIL image as uint8 (size, size, 3), by Lanczos.

    The side of the square is the image's shorter side divided by zoom, but not below size, so that
    only images that are too small are enlarged: for size 256 and zoom 1.125 it is 444 of 500 px,
    256 of 270 px, and 200 of 200 px. The square is the centre or, with a numpy generator, a random
    one.
    """
    short = min(image.size)
    side = min(short, max(size, short / zoom))
    room = np.array(image.size) - side
    x, y = room * (rng.random(2) if rng else 0.5)
    square = image.resize((size, size), Image.LANCZOS, box=(x, y, x + side, y + side))
    return np.array(square)


def to_tensor(arrays):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3): floor(255 x + 0.5) of x in [0, 1], as
    evaluators expect."""
    images = (images.float() / 2 + 0.5) * 255 + 0.5
    return images.clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def batch_size(image_size):
    """Images per pass where no gradients are needed: 16 at 256 px, 4 at 512 px, 50 at most.

    By calculation: keys and values of a guided image take 0.31 GB for d30 at 256 px, and 1.5 GB for
    d36 at 512 px, in 16 bits; an activation of the encoder 42 MB and 168 MB in float32.
    """
    return min(50, max(1, 16 * 256 ** 2 // image_size ** 2))


def make_grid(rows):
    """Rows of uint8 images (n, H, W, 3), two white pixels apart, as a PIL image."""
    widest = max(len(row) for row in rows)
    padded = [np.pad(row, ((0, widest - len(row)), (0, 2), (0, 2), (0, 0)), constant_values=255)
              for row in rows]                              # (widest, H + 2, W + 2, 3) each
    return Image.fromarray(np.vstack([np.hstack(row) for row in padded])[:-2, :-2])


def image_format(path):
    """The format that the name of an image file asks for. UserError if Pillow cannot write it."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f'{path}: the name does not end like an image file; use .png')
    return kind


def image_file(text):
    """An argparse type: the Path of an image file that Pillow can write, for an error before the
    work and not after it."""
    path = a_path(text)
    image_format(path)
    return path


def save_image(path, frames):
    """Writes PIL images as one file, several as an animation. UserError as in image_format, or if
    the disk refuses."""
    options, kind = {}, image_format(path)
    if len(frames) > 1:
        durations = [300] * (len(frames) - 1) + [1500]      # the last frame stays longest, in ms
        options = dict(save_all=True, append_images=frames[1:], loop=0, duration=durations)
    write_file(path, lambda f: frames[0].save(f, kind, **options))
