"""Draws pictures from a checkpoint, and edits photographs.

    python sample.py                                           # ./ckpt.pt, a row a class
    python sample.py --ckpt ckpt.pt --cls 284                  # class index or name, several, all
    python sample.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth --cls 284 --cfg 4
    python sample.py --cls 3 --scales growing.gif              # the picture growing, scale by scale
    python sample.py --edit photo.jpg --box .25,.25,.75,.75    # in-painting; with --cls: editing

Paper: Section 5.1 (the sampling), Section 6 (Fig. 8), Fig. 7.
Also here, because train.py needs them too: errors, devices, checkpoints, pictures in and out.
"""
import argparse
import os
import pickle
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps

from tokenizer import VQVAE
from var import VAR

VERSION = 1          # of the layout of ckpt.pt


class Problem(Exception):
    """What is wrong and what to do, in one line for the user; the process ends with status 2."""


def run(main):
    """Runs main; what a user can mend ends in one line and status 2, an interruption in 130."""
    try:
        main()
        return
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Problem as e:
        message = e
    except OSError as e:
        message = f'{e.filename or "file"}: {e.strerror or e}'
    except (RuntimeError, MemoryError) as e:
        if 'memory' not in str(e) + type(e).__name__.lower():
            raise
        message = 'out of memory: a smaller --batch or, in training, a larger --accumulate may fit'
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(2)


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


def precision(device):
    """bfloat16 autocast where the processor computes in it natively: four times as fast as float32
    on a CPU with AMX. Where it does not, bfloat16 is the slower of the two."""
    native = (torch.cuda.is_bf16_supported() if device.type == 'cuda' else device.type == 'cpu'
              and getattr(torch.cpu, '_is_avx512_bf16_supported', bool)())
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


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
    ckpt = {}
    for file in [path] + ([tokenizer] if tokenizer else []):
        found = read_weights(file)
        if isinstance(found.get('trainer'), dict):                  # of the official trainer
            found = {'vae': found['trainer'].get('vae_local'), 'var': found['trainer'].get('var_wo_ddp')}
        elif 'lvl_1L' in found or 'quantize.embedding.weight' in found:         # a released file
            found = {'var' if 'lvl_1L' in found else 'vae': found}
        elif found.get('version') != VERSION:
            raise Problem(f'{file} is no checkpoint of this program (version {VERSION}), nor released')
        ckpt = {**found, **ckpt, **({'vae': found['vae']} if 'vae' in found else {})}
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
    names = [str(c) for c in ckpt.get('classes') or range(var.num_classes if var else 0)]
    sampling = ckpt.get('sampling') or {'cfg': 1.5, 'top_k': 900, 'top_p': 0.96}    # as released
    return vae, var, {**ckpt, 'classes': names, 'sampling': sampling}


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


# ----------------------------------------------------------------------------------------------
# What is drawn

def classes_of(asked, names):
    """Class indices from indices and names, as the user wrote them; 'all' stands for every class."""
    chosen = []
    for word in asked:
        if word == 'all':
            chosen += range(len(names))
        elif word in names:
            chosen.append(names.index(word))
        elif word.isdigit() and int(word) < len(names):
            chosen.append(int(word))
        else:
            raise Problem(f'--cls {word}: no such class; there are 0 to {len(names) - 1}: '
                          f'{", ".join(names[:12])}{", ..." if len(names) > 12 else ""}')
    return chosen


def keep_mask(boxes, outside, P):
    """(P, P), True where the picture is kept. boxes: 'y0,x0,y1,x1' in fractions, to be drawn anew."""
    new = torch.zeros(P, P, dtype=torch.bool)
    for box in boxes:
        try:
            y0, x0, y1, x1 = (float(v) for v in box.split(','))
        except ValueError:
            raise Problem(f'--box {box}: four fractions, y0,x0,y1,x1') from None
        if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
            raise Problem(f'--box {box}: 0 <= y0 < y1 <= 1, and the same for x')
        new[round(y0 * P):round(y1 * P), round(x0 * P):round(x1 * P)] = True
    if new.all() or not new.any():
        raise Problem(f'--box: between one and {P * P - 1} of the {P} x {P} places must be new')
    return new if outside else ~new


def save_growing(path, vae, tokens):
    """The picture after each scale: a strip, a row a picture, or an animation if it ends in .gif."""
    stages = [to_uint8(x / 2 + 0.5) for x in vae.decode_scales(tokens)]      # K of (B, H, W, 3)
    if path.suffix.lower() != '.gif':
        return save_grid(path, list(np.stack(stages, axis=1)))
    frames = [Image.fromarray(np.concatenate(stage, axis=1)) for stage in stages]
    save_image(path, frames[0], save_all=True, append_images=frames[1:], loop=0,
               duration=[300] * (len(frames) - 1) + [1500])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--ckpt', default='ckpt.pt', help='ckpt.pt of train.py, or a released transformer')
    add('--tokenizer', help='a released tokenizer, for a released transformer')
    add('--cls', nargs='+', default=[], help='class indices, names, or all')
    add('--n', type=int, default=8, help='pictures a class')
    add('--cfg', type=float, help='guidance of the last scale; default: as the checkpoint says')
    add('--top-k', type=int, help='draw from the k likeliest codes; 0: all')
    add('--top-p', type=float, help='draw from the likeliest codes that make up p; 0: all')
    add('--seed', type=int, default=0)
    add('--smooth', action='store_true', help='prettier pictures, but not for FID')
    add('--out', type=Path, default=Path('samples.png'))
    add('--scales', type=Path, help='also the pictures growing scale by scale: a .png or .gif')
    add('--edit', metavar='PHOTO', help='a photograph to in-paint, or with --cls to edit')
    add('--box', action='append', default=[], help='y0,x0,y1,x1 in fractions: drawn anew; several')
    add('--outside', action='store_true', help='draw what is outside the boxes: out-painting')
    add('--device', help='cuda, mps or cpu; the best there is by default')
    args = parser.parse_args()
    if args.n < 1 or (args.top_k or 0) < 0 or not 0 <= (args.top_p or 0) <= 1:
        raise Problem('--n starts at 1, --top-k at 0, and --top-p is between 0 and 1')
    device = pick_device(args.device)
    vae, var, ckpt = load_models(args.ckpt, args.tokenizer)
    if var is None:
        raise Problem(f'{args.ckpt} has a tokenizer only: go on with train.py --resume')
    vae, var, names = vae.to(device), var.to(device), ckpt['classes']
    options = {**ckpt['sampling'], 'smooth': args.smooth}
    options.update({k: v for k in ('cfg', 'top_k', 'top_p') if (v := getattr(args, k)) is not None})
    if args.edit:
        classes = classes_of(args.cls, names) or [var.num_classes]
    else:
        classes = classes_of(args.cls or ['all'], names)[:None if args.cls else 10]
    labels = torch.tensor(classes, device=device).repeat_interleave(args.n)
    drawn, size = [], vae.image_size
    with precision(device):
        if args.edit:
            photo = center(fit(open_picture(args.edit, size), size), size)
            keep = keep_mask(args.box, args.outside, vae.patch_nums[-1])
            known = vae.encode(to_tensor(photo[None]).to(device))
        # Fifty at once, each fifty with a seed of its own: any number fits into the memory.
        for number, part in enumerate(labels.split(50)):
            if args.edit:
                options.update(given=[r_k.expand(len(part), -1) for r_k in known], keep=keep)
            drawn.append(var.generate(vae, part, seed=args.seed + 1_000_003 * number,
                                      return_tokens=True, **options))
        pictures = np.concatenate([to_uint8(images) for images, _ in drawn])
        if args.scales:
            tokens = [torch.cat(maps) for maps in zip(*(tokens for _, tokens in drawn))]
            save_growing(args.scales, vae, tokens)
    rows = np.split(pictures, range(args.n if len(classes) > 1 else 8, len(pictures),
                                    args.n if len(classes) > 1 else 8))
    if args.edit:            # before the results: the photograph, and what of it is kept
        shown = np.kron(keep.numpy(), np.ones((size // len(keep),) * 2))[..., None]
        rows = [np.concatenate([photo[None], (photo * shown + 128 * (1 - shown))[None].astype(np.uint8),
                                row]) for row in rows]
    save_grid(args.out, rows)
    print(f'wrote {args.out}' + (f' and {args.scales}' if args.scales else ''))


if __name__ == '__main__':
    run(main)
