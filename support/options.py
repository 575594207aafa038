"""The options of the commands. Those of train.py are a table: a row for each option, with its
values for each size of images."""
import argparse
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch

from support.run import PRECISIONS, UserError, rank_and_world

# ---- Types of options ----


def make_parser(description):
    """An argparse parser that shows the description as it is written, and a usage of one line."""
    return argparse.ArgumentParser(description=description, usage='%(prog)s [options], see --help',
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def a_path(text):
    """An argparse type: a Path. The shell leaves the ~ of --out=~/runs as it is."""
    return Path(text).expanduser()


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            limit = f'at least {low}' if high == math.inf else f'from {low} to {high}'
            raise argparse.ArgumentTypeError(f'{text} is out of range: {limit}')
        return value
    convert.__name__ = kind.__name__                            # argparse shows it in its messages
    return convert


a_count = number(int, 0)
at_least_1 = number(int, 1)
nonnegative = number(float, 0, 1e6)
a_seed = number(int, 0, 2 ** 63 - 1)
a_guidance = number(float, 0, 100)


def sides(text):
    """An argparse type: '1,2,4' -> (1, 2, 4), the sides of the token maps."""
    values = tuple(int(part) for part in text.split(','))
    if len(values) < 2 or values[0] < 1 or any(a >= b for a, b in zip(values, values[1:])):
        raise argparse.ArgumentTypeError(f'{text}: at least two sides of token maps, which rise')
    return values


# Options that several commands have.
SHARED = {
    '--ckpt': dict(type=a_path, default='ckpt.pt',
                   help='of train.py; with --tokenizer a released one'),
    '--tokenizer': dict(type=a_path, help='a released tokenizer, for a released transformer'),
    '--data': dict(help='as for train.py [what the checkpoint was trained on]'),
    '--cls': dict(nargs='+', action='extend', help='class indices, names, or all'),
    '--n': dict(type=at_least_1, default=8, help='images per class [8]'),
    '--cfg': dict(type=a_guidance, help='guidance of the last scale [of the checkpoint]'),
    '--seed': dict(type=a_seed, default=0, help='the same images for the same seed and options'),
    '--device': dict(help='cuda or cpu [the best there is]')}


def add_shared(parser, *names):
    """Adds options of SHARED to a parser."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


# ---- --cls ----


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


def labels_of(args, ckpt, var, otherwise):
    """The labels (N,) of --n images of each class of --cls, or of the classes `otherwise`."""
    classes = otherwise
    if args.cls:
        classes = classes_of(args.cls, var.num_classes, ckpt.get('classes', []),
                             ckpt.get('words', []))
    return torch.tensor(list(classes)).repeat_interleave(args.n)


# ---- The options of train.py ----

BUILT_IN = ('shapes', 'cifar10')        # what --data means by a name; all else is a folder
# The columns: drawn shapes of 32 px, and sizes of other images in pixels.
SIZES = ('shapes', '32', '64', '256')
RELEASED_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
RELEASED_SAMPLING = dict(cfg=1.5, top_k=900, top_p=0.96)        # behind the FID of Section 5.1
SMALL = dict(ch_mult=(1, 2, 4), z_channels=16, res_blocks=1, normalise=False)


def option(help, kind=str, *by_size, saved=True, **default):
    """A field of Config that is also an option of the command line. kind converts its text;
    by_size: its values in the columns of SIZES, instead of a default; saved: whether the checkpoint
    holds it."""
    metadata = {'help': help, 'kind': kind, 'by_size': by_size, 'saved': saved}
    return field(**default, metadata=metadata)


def unlisted(*by_size):
    """A field of Config that is no option, with its values in the columns of SIZES."""
    return field(metadata={'by_size': by_size})


@dataclass(kw_only=True)
class Config:
    """Everything that defines a run, saved with its weights, and how it is run."""
    data: str = option('shapes, cifar10, or a folder of images', os.path.expanduser,
                       default='shapes')
    size: int = option('side of the images: 32, 64, 256, or another one with --patch-nums; without '
                       'it 32 for shapes and CIFAR-10, and 256 for a folder',
                       number(int, 11), default=None)           # SSIM has a window of 11 pixels
    classes: str = option('use the first N classes, or the classes a,b,c', default='')
    limit: int = option('use at most so many images per class; 0: all', a_count, default=0)
    seed: int = option('seed of everything random', a_seed, default=0)
    init: str = option('a file of weights to start from, for fine-tuning; with --tokenizer train '
                       'stage 1 goes on with its tokenizer',
                       os.path.expanduser, default='')

    # Stage 1. Values are those of the columns shapes, 32, 64 and 256 px.
    tokenizer: str = option(
        'train one, use the official one, or that of a file; without it that of --init',
        os.path.expanduser, 'train', 'train', 'train', 'official')
    patch_nums: tuple = option(
        'sides of the token maps, as 1,2,4',
        sides, (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16), RELEASED_SCALES)
    ch: int = option(
        'channels of the VQVAE at full resolution', at_least_1, 16, 32, 32, 160)
    vocab_size: int = option(
        'V: codes', number(int, 2, 2 ** 16), 256, 1024, 1024, 4096)
    network: dict = unlisted(                                   # what else VQVAE takes
        dict(SMALL, z_channels=8), SMALL, SMALL, {})
    tokenizer_steps: int = option(
        'steps of stage 1', a_count, 450, 2800, 4500, 80000)
    tokenizer_batch: int = option(
        'images per step of stage 1, of all processes', at_least_1, 16, 16, 16, 8)
    tokenizer_lr: float = option(
        'peak learning rate of stage 1', nonnegative, 1e-3, 1e-3, 1e-3, 1e-4)
    perceptual: float = option(
        'weight of L_P in equation (5)', nonnegative, 0., 0., 0., 1.)
    adversarial: float = option(
        'weight of L_G in equation (5), relative to the gradient of the other losses',
        nonnegative, 0., 0.5, 0.5, 0.5)

    # Stage 2.
    depth: int = option(
        'd: width 64 d, d heads, d blocks, equation (7)', at_least_1, 3, 4, 4, 16)
    steps: int = option(
        'steps of stage 2; the default is lowered so that no image is shown more than 300 times',
        a_count, 1750, 6600, 17000, 50000)
    batch: int = option(
        'images per step of stage 2, of all processes', at_least_1, 16, 32, 16, 256)
    lr: float = option(
        'peak learning rate of stage 2, whatever the batch; the paper has 1e-4 per 256 images',
        nonnegative, 5e-3, 3e-3, 3e-3, 1e-4)
    views: int = option(
        'stored crops per image: the centre, then random ones', at_least_1, 1, 1, 4, 2)
    flip: bool = option(
        'mirror images: at random in stage 1, every second view in stage 2 (at least 2 views)',
        bool, False, False, True, True)
    sampling: dict = unlisted(                                  # options of VAR.generate
        dict(cfg=4., top_k=20, top_p=1.), dict(cfg=6., top_k=400, top_p=1.),
        dict(cfg=8., top_k=10, top_p=1.), RELEASED_SAMPLING)
    micro_batch: int = option('images per forward pass of stage 2; without it as many as fit',
                              at_least_1, default=None)
    precision: str = option(f'{", ".join(PRECISIONS)}; without it the best there is', default=None)

    # What follows does not define the run.
    out: Path = option('folder of ckpt.pt, model.pt, log.csv, images and stored tokens', a_path,
                       saved=False, default=Path('.'))
    resume: bool = option('continue from ckpt.pt in --out', bool, saved=False, default=False)
    device: str = option('cuda or cpu; without it the best there is', saved=False, default=None)
    workers: int = option('processes that read images', a_count, saved=False,
                          default=min(4, (os.cpu_count() or 1) - 1))
    compile: bool = option('torch.compile the blocks of the transformer', bool, saved=False,
                           default=False)

    def settings(self):
        """What defines the run, and is saved with its weights, as a dict."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if f.metadata.get('saved', True)}


def parse(description):
    """What the command line of train.py gives, as a dict; an option that is not given is not in it.
    """
    parser = make_parser(description)
    for f in fields(Config):
        if 'help' not in f.metadata:
            continue
        text, by_size = f.metadata['help'], f.metadata['by_size']
        if by_size:
            values = [f'{size}: {str(value).strip("()").replace(" ", "")}'
                      for size, value in zip(SIZES, by_size)]
            text += f' [{"; ".join(values)}]'
        elif f.type is not bool and f.default not in (None, ''):
            text += f' [{f.default}]'
        how = dict(type=f.metadata['kind'], metavar='X')
        if f.type is bool:
            # What a size can switch on, --no-... switches off.
            switch = argparse.BooleanOptionalAction if by_size else 'store_true'
            how = dict(action=switch)
        parser.add_argument('--' + f.name.replace('_', '-'), default=argparse.SUPPRESS,
                            help=text, **how)
    return vars(parser.parse_args())


def make_config(given, saved=None):
    """The Config of a run. The command line (given) comes first, then what the run had before
    (saved, for --resume), then the column of the greatest size that is not above that of the
    images, then the defaults. UserError for values that do not fit together."""
    known = {f.name for f in fields(Config)}            # an older run can have others
    chosen = {name: value for name, value in (saved or {}).items() if name in known} | given
    data = chosen.get('data', Config.data)
    size = chosen['size'] = chosen.get('size') or (32 if data in BUILT_IN else 256)
    columns = [1] + [i for i, name in enumerate(SIZES[1:], start=1) if int(name) <= size]
    column = 0 if data == 'shapes' and size == 32 else columns[-1]
    if chosen.get('init'):
        chosen.setdefault('tokenizer', chosen['init'])
    preset = {f.name: f.metadata['by_size'][column] for f in fields(Config)
              if f.metadata.get('by_size')}
    config = Config(**{**preset, **chosen})
    if config.precision not in (None, *PRECISIONS):
        raise UserError(f'--precision {config.precision}: choose from {", ".join(PRECISIONS)}')
    _, world = rank_and_world()
    batches = {'--batch': config.batch}
    if config.tokenizer == 'train':
        batches['--tokenizer-batch'] = config.tokenizer_batch
    for name, batch in batches.items():
        if batch % world:
            raise UserError(f'{name} {batch} must be a multiple of the {world} processes')
    if config.flip:
        config.views = max(config.views, 2)     # the second view is the first that is mirrored
    return config
