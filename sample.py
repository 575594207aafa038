"""Draws pictures from a checkpoint; edits photographs; writes samples for the field's evaluators.

    python sample.py                                           # ./ckpt.pt, a row a class
    python sample.py --ckpt ckpt.pt --cls 284                  # class index or name, several, all
    python sample.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth --cls 284 --cfg 4
    python sample.py --cls 3 --scales growing.gif              # scale by scale
    python sample.py --edit photo.jpg --box .25,.25,.75,.75    # in-painting; --cls: class editing
    python sample.py --npz out.npz --n 50 --cls all            # for the evaluators (Section 5.1)
    torchrun --nproc_per_node 4 sample.py --npz out.npz ...    # the same pictures, shared out

Paper: Section 5.1 (Table 1, VAR-d30-re included), Section 6 (Fig. 8), Fig. 7.
Also here, because train.py needs it too: devices, errors, checkpoints and pictures in and out.
"""
import argparse
import hashlib
import json
import os
import pickle
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageFile, ImageOps

from tokenizer import VQVAE
from var import VAR

VERSION = 1                             # of the layout of ckpt.pt
# Released files have no configuration: all 256x256 models have the ten scales of VAR's level buffer.
RELEASED_SAMPLING = {'cfg': 1.5, 'top_k': 900, 'top_p': 0.96}


class Problem(Exception):
    """What is wrong and what to do, in one line for the user; the process ends with status 2."""


def run(main):
    """Runs main; what a user can mend ends in one line and status 2, an interruption in 130."""
    try:
        main()
    except Problem as e:
        sys.exit(fail(e))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except OSError as e:
        sys.exit(fail(f'{e.filename or "file"}: {e.strerror or e}'))
    except (RuntimeError, MemoryError) as e:
        if 'memory' not in str(e) + type(e).__name__.lower():
            raise
        sys.exit(fail('out of memory: try a smaller --batch, and in training --accumulate'))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(message):
    print(f'error: {message}', file=sys.stderr, flush=True)
    return 2


def pick_device(name=None):
    """The device asked for, or the best there is: cuda, mps, cpu. Joins torchrun's process group."""
    rank, world = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    name = name or ('cuda' if torch.cuda.is_available() else
                    'mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        device = torch.device(f'cuda:{rank}' if name == 'cuda' else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise Problem(f'--device {name}: {str(e).splitlines()[0]}') from None
    if world > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    return device


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def precision(device, float32=False):
    """bfloat16 autocast where the processor computes in it natively, where it is about 4 times as
    fast as float32 (measured on a CPU with AMX); elsewhere it would be slower than float32."""
    native = device.type == 'cuda' and torch.cuda.is_bf16_supported() or (
        device.type == 'cpu' and getattr(torch.cpu, '_is_avx512_bf16_supported', bool)())
    return torch.autocast(device.type, torch.bfloat16, enabled=bool(native and not float32))


# ----------------------------------------------------------------------------------------------
# Checkpoints

def write_whole(path, write):
    """Calls write(temporary file), flushes it to disk, renames it: path is old or new, never half."""
    path = Path(path)
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:              # torch reports a full disk as RuntimeError
        raise Problem(f'cannot write {path}: {getattr(e, "strerror", None) or e}') from None
    finally:
        part.unlink(missing_ok=True)


def read_weights(path):
    """A dict from a file of torch.save, whatever it claims to be: no code in it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as e:
        raise Problem(f'cannot read {path}: {e.strerror or e}') from None
    except pickle.UnpicklingError:
        raise Problem(f'{path} is not a file of weights alone; it is not loaded') from None
    except Exception:                     # a damaged file can fail anywhere inside torch's reader
        raise Problem(f'{path} is cut short, damaged, or no checkpoint') from None
    if not isinstance(ckpt, dict):
        raise Problem(f'{path} holds no checkpoint')
    return ckpt


def load_models(path, tokenizer=None):
    """(vae, var or None, checkpoint) from a ckpt.pt of train.py, or from released files.

    tokenizer: a second file for the tokenizer, which a released transformer needs. The models are
    on the CPU, in evaluation mode. Raises Problem where the file is of another kind.
    """
    ckpt = read_weights(path)
    if 'trainer' in ckpt and isinstance(ckpt['trainer'], dict):      # the official trainer's own files
        ckpt = {'vae': ckpt['trainer'].get('vae_local'), 'var': ckpt['trainer'].get('var_wo_ddp')}
    elif 'lvl_1L' in ckpt:
        ckpt = {'var': ckpt}
    elif 'quantize.embedding.weight' in ckpt:
        ckpt = {'vae': ckpt}
    elif ckpt.get('version', VERSION) != VERSION or not ckpt.keys() & {'vae', 'var'}:
        raise Problem(f'{path} is no checkpoint of this program (version {VERSION}), nor a released one')
    if tokenizer:
        other = read_weights(tokenizer)
        ckpt['vae'] = other.get('vae', other)
    try:
        var = VAR.from_state_dict(ckpt['var']).eval() if ckpt.get('var') else None
        sides = var.patch_nums if var else ckpt.get('patch_nums', VQVAE().patch_nums)
        if not ckpt.get('vae'):
            raise Problem(f'{path} has no tokenizer: add --tokenizer vae_ch160v4096z32.pth')
        vae = VQVAE.from_state_dict(ckpt['vae'], sides).eval()
    except Problem:
        raise
    except Exception as e:                # hostile shapes fail in many ways, all of them this one
        raise Problem(f'{path}: weights do not fit this model ({str(e).splitlines()[0][:80]})') from None
    if var and (var.vocab_size, var.word_embed.in_features) != vae.quantize.embedding.weight.shape:
        raise Problem(f'the tokenizer and the transformer of {path} were not trained together')
    names = [str(c) for c in ckpt.get('classes', range(var.num_classes if var else 0))]
    return vae, var, {**ckpt, 'classes': names, 'sampling': ckpt.get('sampling', RELEASED_SAMPLING)}


# ----------------------------------------------------------------------------------------------
# Pictures

def open_picture(path, size):
    """A picture file as RGB, upright, its shorter side at least `size` pixels: a PIL image.

    Greyscale, palette, CMYK, 16 bit, transparent (on white) and animated (the first frame) too.
    Raises Problem if Pillow cannot read it to the end, or if it would fill the memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.draft('RGB', (2 * size, 2 * size))     # JPEG: decode at a fraction of the size
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith('I;16') or image.mode in 'IF':
                    a = np.asarray(image, dtype=np.float32)
                    image = Image.fromarray((a / (a.max() / 255 if a.max() > 255 else 1)).astype('uint8'))
                if image.has_transparency_data:
                    image = Image.alpha_composite(
                        Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
                return image.convert('RGB')
    except OSError as e:
        raise Problem(f'{path}: {e.strerror or "not a whole picture"}') from None
    except Exception as e:                # decoders of damaged files raise what they like
        raise Problem(f'{path}: {str(e).splitlines()[0][:80] if str(e) else type(e).__name__}') from None


def fit(image, size, short=None):
    """Scales a PIL image by Lanczos until its shorter side is `short` (default: size)."""
    w, h = image.size
    scale = (short or size) / min(w, h)
    return image.resize((max(size, round(w * scale)), max(size, round(h * scale))), Image.LANCZOS)


def center(image, size):
    """The middle square of a PIL image, uint8 (size, size, 3)."""
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((x, y, x + size, y + size)))


def to_tensor(pictures):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images):
    """(B, 3, H, W) in [0, 1] -> uint8 (B, H, W, 3), floor(255 x + 0.5) as the evaluators expect."""
    return (images.float() * 255 + 0.5).floor().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, rows):
    """Rows of uint8 pictures (n, H, W, 3), with a margin of two pixels between them, to a file."""
    H, W = rows[0].shape[1:3]
    sheet = Image.new('RGB', ((W + 2) * max(map(len, rows)) - 2, (H + 2) * len(rows) - 2), 'white')
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (x * (W + 2), y * (H + 2)))
    save_image(path, sheet)


def save_image(path, image, **options):
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise Problem(f'cannot tell the kind of picture from the name {path}: end it in .png')
    write_whole(path, lambda f: image.save(f, kind, **options))
