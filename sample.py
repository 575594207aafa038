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
import atexit
import inspect
import os
import shutil
import sys
import time
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageFilter, ImageOps

from tokenizer import VQVAE
from var import VAR

VERSION = 1                     # of the layout of ckpt.pt
# What the released files do not tell: the tokenizer's scales, and the sampling behind the FID of
# Section 5.1 (top-k is 600 in Table 3).
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
    except Problem:
        raise
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
        names = 'OutOfMemory', 'allocate memory', 'MemoryError'        # CUDA's, the CPU's, numpy's
        if not any(name in f'{type(e)} {e}' for name in names):
            raise
        message = 'out of memory: in training, a smaller --batch or a larger --accumulate may fit'
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
        if device.type == 'cuda':
            torch.cuda.set_device(device)                      # for the collectives
    if world > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        atexit.register(dist.destroy_process_group)            # its threads may abort the exit
    return device

def rank_and_world():
    """The number of this process and how many there are: (0, 1) if it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def precision(device):
    """bfloat16 autocast where the processor computes in it natively: four times as fast as float32
    on a CPU with AMX. Where it does not, bfloat16 is the slower of the two."""
    native = (torch.cuda.get_device_capability(device) >= (8, 0) if device.type == 'cuda' else
              device.type == 'cpu' and getattr(torch.cpu, '_is_avx512_bf16_supported', bool)())
    return torch.autocast(device.type, torch.bfloat16, enabled=native)

def write_whole(path, write):
    """Calls write(temporary file), flushes it to disk, renames it: path is old or new, never half.
    Where the disk refuses it raises Problem, and leaves nothing behind."""
    part = Path(path).with_name(f'.{Path(path).name}.part')    # only beside it can it be renamed
    with attempt(f'cannot write {path}', 'the disk may be full'):
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, 'wb') as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())                           # or a crash could rename a hole
            os.replace(part, path)                             # at once, for every reader
        finally:
            part.unlink(missing_ok=True)

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

def ready(var, device):
    """The transformer on its device, with the weights of its products cast once rather than once a
    picture, where autocast would: 3.2 s instead of 3.7 for one at d16 on two cores, to the same
    tokens. For use under precision() alone."""
    with precision(device):
        lower = torch.is_autocast_enabled(device.type)
    for module in var.modules():
        if lower and isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
    return var.to(device)

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

def crop(image, size, short=None, rng=None):
    """uint8 (size, size, 3) of a PIL image whose shorter side Lanczos makes `short`, or size, long:
    its middle or, with a generator of numpy's, any part of it."""
    scale = (short or size) / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.LANCZOS)
    room = np.array(image.size) - size
    x, y = rng.integers(room + 1) if rng else room // 2
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

def new_places(args, P, size):
    """What is to be drawn anew: places (P, P) and pixels (size, size), both bool.

    By --box, y0,x0,y1,x1 in fractions, or by --mask, a picture whose white is new; with --outside
    all else is. Raises Problem where that leaves nothing to keep or nothing to draw.
    """
    pixels, s = np.zeros((size, size), dtype=bool), size // P
    if args.mask:
        pixels = crop(open_picture(args.mask, size), size)[..., 0] > 127
    for box in args.box:                                       # whole places, as in the release
        with attempt(f'--box {box}', 'y0,x0,y1,x1, fractions with 0 <= y0 < y1 <= 1, also x'):
            y0, x0, y1, x1 = (float(v) for v in box.split(','))
            if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
                raise ValueError
        pixels[round(y0 * P) * s:round(y1 * P) * s, round(x0 * P) * s:round(x1 * P) * s] = True
    pixels = pixels ^ args.outside
    new = pixels.reshape(P, s, P, s).any((1, 3))               # with one new pixel all of it is new
    if new.all() or not new.any():
        raise Problem(f'--box or --mask: 1 to {P * P - 1} of the {P} x {P} places must be new')
    return new, pixels

def likelihood_ratio(vae, var, tokens, labels):
    """log p(tokens | class) - log p(tokens | no class), (B,): how well the class explains them."""
    x, drawn = vae.var_input(tokens), torch.cat(tokens, dim=1)                  # (B, L)
    told, untold = (-var(y, x, tokens=drawn)[0].sum(1)
                    for y in (labels, torch.full_like(labels, var.num_classes)))
    return told - untold

@torch.no_grad()
def draw(vae, var, labels, seed, rounds=1, classifier=None, **options):
    """VAR.generate with rejection: of `rounds` pictures for each label (B,) the best is kept.

    The judge is a classifier, images (B, 3, H, W) in [0, 1] -> logits (B, classes), or, with none,
    the likelihood ratio of class to no class. Returns images, K token maps. Table 1, VAR-d30-re.
    """
    draws, scores = [], []
    for r in range(rounds):
        images, tokens = var.generate(vae, labels, seed=seed + r, return_tokens=True, **options)
        draws.append((images, *tokens))
        if rounds > 1 and classifier is None:
            scores.append(likelihood_ratio(vae, var, tokens, labels))           # (B,)
        elif classifier:
            with attempt('--classifier', f'does not take {tuple(images.shape)}, or lacks a class'):
                scores.append(classifier(images).log_softmax(-1).gather(1, labels[:, None])[:, 0])
    if rounds == 1:
        return images, tokens
    best, place = torch.stack(scores).argmax(0), torch.arange(len(labels), device=labels.device)
    images, *tokens = (torch.stack(each)[best, place] for each in zip(*draws))  # of the best, (B,)
    return images, tokens

def parse(options, doc):
    """What the command line gives of a dataclass of options, as a dict; defaults are not in it.

    --help shows doc and the source of the class: there the comments say what an option does.
    """
    parser = argparse.ArgumentParser(
        usage='%(prog)s [--option value ...]', description=doc, epilog=inspect.getsource(options),
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in fields(options):
        how = {bool: dict(action='store_true'), list: dict(action='extend', nargs='+')}
        if option.type is not dict:
            parser.add_argument('--' + option.name.replace('_', '-'), help=argparse.SUPPRESS,
                                **how.get(option.type, dict(type=option.type)))
    return vars(parser.parse_args())

@dataclass
class Options:
    """The options of the command line, as --name value."""
    ckpt: Path = Path('ckpt.pt')        # of train.py, or a released transformer
    tokenizer: Path = None              # a released tokenizer, for a released transformer
    cls: list = ()                      # class indices, names, or all
    n: int = 8                          # pictures a class
    cfg: float = None                   # guidance of the last scale; else as the checkpoint says
    top_k: int = None                   # draw from the k likeliest codes; 0: all
    top_p: float = None                 # draw from the likeliest codes that make up p; 0: all
    seed: int = 0                       # the same seed, the same pictures
    smooth: bool = False                # prettier pictures, but not for FID
    reject: int = 1                     # draw so many for each picture, and keep the best
    classifier: Path = None             # its judge, TorchScript or torch.export; else the model
    out: Path = Path('samples.png')     # the sheet, one row a class
    png: Path = None                    # folder for one file a picture, instead of the sheet
    npz: Path = None                    # file for the field's evaluators, shuffled, instead
    scales: Path = None                 # also the pictures growing scale by scale: a .png or .gif
    edit: Path = None                   # a photograph to in-paint, or with --cls to edit
    box: list = ()                      # y0,x0,y1,x1 in fractions: to be drawn anew; several
    mask: Path = None                   # or a picture, white where the photograph is drawn anew
    outside: bool = False               # draw all else anew instead: out-painting
    paste: bool = False                 # put the photograph's own pixels back where it is kept
    device: str = None                  # cuda, mps or cpu; the best there is if not given

@torch.no_grad()
def main():
    """The command line: draws what it asks for, fifty pictures at a time, and writes it.

    Each fifty have a seed and a file of their own, so that several processes share the work, and
    the same command goes on where it was interrupted.
    """
    args = Options(**parse(Options, __doc__))
    if min(args.n, args.reject, 1 + (args.top_k or 0), 1 + args.seed) < 1 or (
            not 0 <= (args.top_p or 0) <= 1):
        raise Problem('--n and --reject start at 1, --top-k and --seed at 0; --top-p is 0 to 1')
    if args.edit and args.reject > 1 and not args.cls:
        raise Problem('--reject keeps what looks most like a class: name it by --cls')
    if not args.edit and (args.box or args.mask or args.outside or args.paste):
        raise Problem('--box, --mask, --outside and --paste need a photograph: --edit')
    device, (rank, world) = pick_device(args.device), rank_and_world()
    vae, var, ckpt = load_models(args.ckpt, args.tokenizer)
    if var is None:
        raise Problem(f'{args.ckpt} has a tokenizer only: go on with train.py --resume')
    vae, var, size = vae.to(device), ready(var, device), vae.image_size
    asked = {'cfg': args.cfg, 'top_k': args.top_k, 'top_p': args.top_p}
    options = ckpt['sampling'] | {k: v for k, v in asked.items() if v is not None}
    options |= {'smooth': args.smooth, 'rounds': args.reject}
    if args.classifier:
        with attempt(f'--classifier {args.classifier}', 'no file of TorchScript or torch.export'):
            options['classifier'] = torch.jit.load(args.classifier, device) if (
                args.classifier.suffix != '.pt2') else torch.export.load(args.classifier).module()
    # Where no class is asked for: "no class" for an edit, and the first ten for other pictures.
    default = [var.num_classes] if args.edit else range(min(10, var.num_classes))
    classes = classes_of(args.cls, var.num_classes, ckpt.get('classes', [])) or default
    labels = torch.tensor(classes).repeat_interleave(args.n)                    # (N,)
    if args.edit:
        photo = crop(open_picture(args.edit, size), size)                       # (H, W, 3)
        new, pixels = new_places(args, vae.patch_nums[-1], size)                # (P, P), (H, W)

    key = zlib.crc32(repr((args, os.path.getmtime(args.ckpt))).encode())
    parts, batches = Path(f'{args.npz or args.out}.{key:08x}'), labels.split(50)
    began, mine = time.time(), list(enumerate(batches))[rank::world]
    with precision(device):
        if args.edit:      # one photograph stands for all B: token maps (1, l) broadcast to (B, l)
            given = vae.encode(to_tensor(photo[None]).to(device))
            options |= {'given': given, 'keep': torch.from_numpy(~new)}
        for done, (number, label) in enumerate(mine, 1):
            if not (parts / f'{number}.npz').exists():
                seed = args.seed + 1_000_003 * number
                images, tokens = draw(vae, var, label.to(device), seed, **options)
                arrays = {'drawn': to_uint8(images)}                            # (B, H, W, 3)
                if args.scales:
                    growing = [to_uint8(x / 2 + 0.5) for x in vae.decode_scales(tokens)]
                    arrays['growing'] = np.stack(growing, axis=1)               # (B, K, H, W, 3)
                write_whole(parts / f'{number}.npz', lambda f: np.savez(f, **arrays))
            left = (time.time() - began) / done * (len(mine) - done)
            print(f'\r{done} of {len(mine)} batches, {left:.0f} s left ', end='', flush=True)
    if world > 1:
        dist.barrier()
    if rank:
        return

    def everything(name):
        return np.concatenate([np.load(parts / f'{i}.npz')[name] for i in range(len(batches))])

    drawn, wide = everything('drawn'), args.n if len(classes) > 1 else 8        # (N, H, W, 3)
    if args.paste:                                   # with an edge as soft as 1/64 of the picture
        edge = Image.fromarray(np.uint8(255 * pixels)).filter(ImageFilter.GaussianBlur(size / 64))
        share = np.asarray(edge)[..., None] / 255                               # (H, W, 1)
        drawn = np.uint8(share * drawn + (1 - share) * photo + 0.5)
    if args.scales:        # a row a picture, or a frame a scale with the pictures in one row
        sheet = everything('growing')                                           # (N, K, H, W, 3)
        gif = args.scales.suffix.lower() == '.gif'
        save_grid(args.scales, *(sheet.swapaxes(0, 1)[:, None] if gif else [sheet]))
    if args.npz:           # shuffled, as the field's evaluator takes inception scores of blocks
        order = np.random.default_rng(args.seed).permutation(len(labels))
        arrays = {'arr_0': drawn[order], 'arr_1': labels.numpy()[order]}
        write_whole(args.npz, lambda f: np.savez(f, **arrays))
    for i, picture in enumerate(drawn if args.png else ()):
        save_grid(args.png / f'{i:06d}.png', [picture[None]])
    rows = np.split(drawn, range(wide, len(labels), wide))
    if args.edit:          # before the results: the photograph, and what of it is kept
        before = np.stack([photo, np.where(pixels[..., None], np.uint8(128), photo)])
        rows = [np.concatenate([before, row]) for row in rows]
    if not args.npz and not args.png:
        save_grid(args.out, rows)
    shutil.rmtree(parts)
    print(f'\rdrew {len(labels) * args.reject} pictures, wrote',
          *(path for path in (args.npz, args.png, args.scales) if path),
          *[args.out] * (not args.npz and not args.png))

if __name__ == '__main__':
    run(main)
