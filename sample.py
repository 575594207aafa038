"""Draws pictures from a checkpoint, and edits photographs.

    python sample.py                                           # ./ckpt.pt, a row a class
    python sample.py --ckpt ckpt.pt --cls 284                  # class index or name, several, all
    python sample.py --ckpt var_d16.pth --tokenizer vae_ch160v4096z32.pth --cls 284 --cfg 4
    python sample.py --cls 3 --scales growing.gif              # the picture growing, scale by scale
    python sample.py --edit photo.jpg --box .25,.25,.75,.75    # in-painting; with --cls: editing

Paper: Section 5.1 (the sampling), Section 6 (Fig. 8), Fig. 7.
Also here, because train.py needs them too: errors, devices, checkpoints, pictures in and out.
Letters: B pictures at once, N in all, H x W their pixels, K scales, P places a side of the last.
"""
import argparse
import os
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps

from tokenizer import VQVAE
from var import VAR

VERSION = 1                     # of the layout of ckpt.pt
# What the released files do not tell: the tokenizer's scales, and the sampling of Section 5.1.
RELEASED = {'patch_nums': (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
            'sampling': {'cfg': 1.5, 'top_k': 900, 'top_p': 0.96}}


class Problem(Exception):
    """What is wrong and what to do, in one line for the user; the process ends with status 2."""


@contextmanager
def attempt(what, otherwise):
    """Turns any failure inside it into a Problem, as a damaged or hostile file may raise anything.

    It says what failed, and why: the system's reason (no such file), or `otherwise` if it has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                    # the user gets one line, or none
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            yield                                              # the body of the with statement
    except Exception as e:
        raise Problem(f'{what}: {getattr(e, "strerror", None) or otherwise}') from None


def run(main):
    """Runs main; what a user can mend ends in one line and status 2, an interruption in 130.

    Every other exception is a fault of the program, and keeps its traceback.
    """
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)                                          # as shells say it: 128 + SIGINT
    except (Problem, OSError) as e:
        message = e
    except (RuntimeError, MemoryError) as e:
        if 'memory' not in f'{type(e)} {e}'.lower():           # torch has several errors for it
            raise
        message = 'out of memory: a smaller --batch or, in training, a larger --accumulate may fit'
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(2)


def pick_device(name=None):
    """The device asked for, or the best there is; Problem where it cannot be used.

    Under torchrun it also joins the process group, and each process takes the GPU of its number.
    """
    rank, world = int(os.environ.get('LOCAL_RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    name = name or ('cuda' if torch.cuda.is_available() else
                    'mps' if torch.backends.mps.is_available() else 'cpu')
    with attempt(f'--device {name}', 'torch knows no such device, or this machine has none'):
        device = torch.device(f'cuda:{rank}' if name == 'cuda' else name)
        torch.zeros(1, device=device)                          # only use shows whether it is there
    if world > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    return device


def rank_and_world():
    """The number of this process and how many there are: (0, 1) if it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def precision(device):
    """bfloat16 autocast where the processor computes in it natively: four times as fast as float32
    on a CPU with AMX. Where it does not, bfloat16 is the slower of the two."""
    native = (torch.cuda.is_bf16_supported() if device.type == 'cuda' else device.type == 'cpu'
              and getattr(torch.cpu, '_is_avx512_bf16_supported', bool)())
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def write_whole(path, write):
    """Calls write(temporary file), flushes it to disk, renames it: path is old or new, never half.
    Where the disk refuses it raises Problem, and leaves nothing behind."""
    folder = Path(path).parent                                 # only there can it be renamed
    with attempt(f'cannot write {path}', 'the disk may be full'):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.', dir=folder) as beside:
            with open(Path(beside, 'part'), 'wb') as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())                           # or a crash could rename a hole
            os.replace(f.name, path)                           # at once, for every reader


def read_weights(path):
    """A dict from a file of torch.save, whatever it claims to be: no code in it is run.

    Models are under 'vae' and 'var', as train.py saves them, also where others made the file.
    """
    with attempt(f'cannot read {path}', 'cut short, damaged, or no checkpoint of weights alone'):
        ckpt = dict(torch.load(path, map_location='cpu', weights_only=True))
        if 'lvl_1L' in ckpt:                                   # a released transformer
            return {'var': ckpt}
        if 'quantize.embedding.weight' in ckpt:                # a released tokenizer
            return {'vae': ckpt}
        if trainer := ckpt.get('trainer'):                     # both, from the official trainer
            return {'vae': trainer['vae_local'], 'var': trainer['var_wo_ddp']}
        return ckpt


def load_models(path, tokenizer=None):
    """(vae, var or None, checkpoint) from a ckpt.pt of train.py, or from released files.

    tokenizer: a second file for the tokenizer, which a released transformer needs. The models are
    on the CPU, in evaluation mode; the checkpoint always has 'sampling', options of VAR.generate.
    Raises Problem where a file is of another kind, or where the two do not belong together.
    """
    ckpt = RELEASED | read_weights(path)
    if tokenizer:
        ckpt['vae'] = read_weights(tokenizer).get('vae')
    if not ckpt.get('vae') or ckpt.get('version', VERSION) != VERSION:
        raise Problem(f'{path} is no checkpoint of version {VERSION} with a tokenizer: if it is a '
                      'released transformer, add --tokenizer vae_ch160v4096z32.pth')
    with attempt(path, 'its weights do not fit this model'):
        var = VAR.from_state_dict(ckpt['var']).eval() if ckpt.get('var') else None
        sides = var.patch_nums if var else ckpt['patch_nums']
        vae = VQVAE.from_state_dict(ckpt['vae'], sides).eval()
    if var and (var.vocab_size, var.word_embed.in_features) != vae.quantize.embedding.weight.shape:
        raise Problem(f'the tokenizer and the transformer of {path} were not trained together')
    return vae, var, ckpt


def open_picture(path, size):
    """A picture file as RGB, upright, its shorter side at least `size` pixels: a PIL image.

    Greyscale, palette, CMYK, 16 bit, transparent (on white) and animated (the first frame) too.
    Raises Problem if Pillow cannot read it to the end, or if it would fill the memory.
    """
    with attempt(path, 'not a whole picture, or far too large'), Image.open(path) as image:
        image.draft('RGB', (2 * size, 2 * size))               # decodes a JPEG smaller
        image = ImageOps.exif_transpose(image)                 # cameras note which side is up
        if image.mode[0] in 'IF':                              # convert() would cut at 255
            grey = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((grey / max(grey.max() / 255, 1)).astype(np.uint8))
        if image.has_transparency_data:                        # in palettes and greys as well
            white = Image.new('RGBA', image.size, 'white')
            image = Image.alpha_composite(white, image.convert('RGBA'))
        return image.convert('RGB')


def fit(image, size, short=None):
    """Scales a PIL image by Lanczos until its shorter side is `short` (default: size)."""
    scale = (short or size) / min(image.size)
    return image.resize([max(size, round(side * scale)) for side in image.size], Image.LANCZOS)


def center(image, size):
    """The middle square of a PIL image, uint8 (size, size, 3)."""
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((x, y, x + size, y + size)))    # a copy, as torch wants to write


def to_tensor(pictures):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images):
    """(B, 3, H, W) in [0, 1] -> uint8 (B, H, W, 3), floor(255 x + 0.5) as the evaluators expect."""
    return (images.float() * 255 + 0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def save_grid(path, *grids):
    """Writes rows of uint8 pictures (n, H, W, 3), two white pixels apart, as the name of path says.

    Several grids are the frames of an animation. Raises Problem for a name of no kind of picture.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in Image.SAVE:
        raise Problem(f'cannot tell the kind of picture from the name {path}: end it in .png')
    frames, most = [], max(len(row) for rows in grids for row in rows)
    for rows in grids:
        padded = [np.pad(row, ((0, most - len(row)), (0, 2), (0, 2), (0, 0)), constant_values=255)
                  for row in rows]                             # (most, H + 2, W + 2, 3) each
        frames.append(Image.fromarray(np.vstack([np.hstack(row) for row in padded])[:-2, :-2]))
    options = {'save_all': True, 'append_images': frames[1:], 'loop': 0,
               'duration': [300] * len(frames[1:]) + [1500]}   # the last frame stays to be seen
    write_whole(path, lambda f: frames[0].save(f, kind, **options if frames[1:] else {}))


def classes_of(words, n, names):
    """Indices of the classes that the user wrote as an index below n, as a name, or as 'all'."""
    meaning = {str(i): [i] for i in range(n)}
    meaning |= {name: [i] for i, name in enumerate(names)}     # a class may have the name 7
    meaning['all'] = range(n)                                  # and no class can be named so
    if unknown := [word for word in words if word not in meaning]:
        raise Problem(f'--cls {unknown[0]}: no such class; there are 0 to {n - 1}, all, '
                      + ', '.join(names[:12]))
    return [i for word in words for i in meaning[word]]


def keep_mask(boxes, outside, P):
    """(P, P), True where the picture is kept. boxes: 'y0,x0,y1,x1' in fractions, to be drawn anew;
    with outside, to be kept. Raises Problem where that leaves nothing to keep or to draw."""
    new = torch.zeros(P, P, dtype=torch.bool)                  # or, with outside, not new
    for box in boxes:
        with attempt(f'--box {box}', 'four fractions, y0,x0,y1,x1, with 0 <= y0 < y1 <= 1, also x'):
            y0, x0, y1, x1 = (float(v) for v in box.split(','))
            if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
                raise ValueError
        new[round(y0 * P):round(y1 * P), round(x0 * P):round(x1 * P)] = True
    if new.all() or not new.any():
        raise Problem(f'--box: between one and {P * P - 1} of the {P} x {P} places must be new')
    return new if outside else ~new


def main():
    """The command line: draws what it asks for, fifty pictures at a time, and writes the sheets."""
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
    vae, var, size = vae.to(device), var.to(device), vae.image_size
    asked = {'cfg': args.cfg, 'top_k': args.top_k, 'top_p': args.top_p}
    options = ckpt['sampling'] | {k: v for k, v in asked.items() if v is not None}
    # Where no class is asked for: "no class" for an edit, and the first ten for other pictures.
    default = [var.num_classes] if args.edit else range(min(10, var.num_classes))
    classes = classes_of(args.cls, var.num_classes, ckpt.get('classes', [])) or default
    labels = torch.tensor(classes, device=device).repeat_interleave(args.n)     # (N,)
    pictures, growing = [], []
    with precision(device):
        if args.edit:
            photo = center(fit(open_picture(args.edit, size), size), size)      # (H, W, 3)
            keep = keep_mask(args.box, args.outside, vae.patch_nums[-1])        # (P, P)
            # One photograph stands for all B: token maps (1, l) broadcast to (B, l).
            options |= {'given': vae.encode(to_tensor(photo[None]).to(device)), 'keep': keep}
        # Fifty at once, each fifty with a seed of its own: any number fits into the memory.
        for number, part in enumerate(labels.split(50)):
            images, tokens = var.generate(vae, part, seed=args.seed + 1_000_003 * number,
                                          smooth=args.smooth, return_tokens=True, **options)
            pictures.append(to_uint8(images))                                   # (B, H, W, 3)
            if args.scales:
                stages = [to_uint8(x / 2 + 0.5) for x in vae.decode_scales(tokens)]
                growing.append(np.stack(stages, axis=1))                        # (B, K, H, W, 3)
    wide = args.n if len(classes) > 1 else 8
    rows = np.split(np.concatenate(pictures), range(wide, len(labels), wide))
    if args.edit:            # before the results: the photograph, and what of it is kept
        kept = np.kron(keep.numpy(), np.ones((size // len(keep),) * 2, dtype=bool))[..., None]
        before = np.stack([photo, np.where(kept, photo, np.uint8(128))])        # (2, H, W, 3)
        rows = [np.concatenate([before, row]) for row in rows]
    if args.scales:          # a row a picture, or a frame a scale with the pictures in one row
        sheet = np.concatenate(growing)                                         # (N, K, H, W, 3)
        frames = sheet.swapaxes(0, 1)[:, None]                                  # (K, 1, N, H, W, 3)
        save_grid(args.scales, *(frames if args.scales.suffix.lower() == '.gif' else [sheet]))
    save_grid(args.out, rows)
    print(f'wrote {args.out}' + (f' and {args.scales}' if args.scales else ''))


if __name__ == '__main__':
    run(main)
