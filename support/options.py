"""The options of the commands: types, shared ones, the recipes of train.py, what --cls means."""
import argparse
import math
import os
from pathlib import Path

import torch

from support.run import PRECISIONS, UserError, write_file


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float from low to high."""
    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f'{text} is out of range: from {low} to {high}')
        return value
    convert.__name__ = kind.__name__                            # argparse shows it in its messages
    return convert


a_count = number(int, 0)
at_least_1 = number(int, 1)
nonnegative = number(float, 0, 1e6)
a_seed = number(int, 0, 2 ** 63 - 1)


def sides(text):
    """An argparse type: '1,2,4' -> (1, 2, 4), the sides of the token maps."""
    values = tuple(int(part) for part in text.split(','))
    if len(values) < 2 or values[0] < 1 or any(a >= b for a, b in zip(values, values[1:])):
        raise argparse.ArgumentTypeError(f'{text}: at least two sides of token maps, which rise')
    return values


def new_file(ending):
    """An argparse type: the Path of a file to be written, whose name ends so. The place is tried,
    so that an error comes before the work and not after it."""
    def convert(text):
        path = Path(text)
        if path.suffix != ending:
            raise argparse.ArgumentTypeError(f'{text}: the name must end with {ending}')
        probe = path.with_name(f'.{path.name}.{os.getpid()}')
        write_file(probe, lambda f: None)
        probe.unlink()
        return path
    return convert


SHARED = {
    '--ckpt': dict(type=Path, default='ckpt.pt', help='of train.py, or a released one [ckpt.pt]'),
    '--tokenizer': dict(type=Path, help='a released tokenizer, for a released transformer'),
    '--data': dict(help='as for train.py [that of the training]'),
    '--cls': dict(nargs='+', action='extend', help='class names, indices, or all'),
    '--n': dict(type=at_least_1, default=8, help='images per class [8]'),
    '--cfg': dict(type=number(float, 0, 100), help='guidance of the last scale [of --ckpt]'),
    '--seed': dict(type=a_seed, default=0, help='the same images for the same seed and options'),
    '--npz': dict(type=new_file('.npz'), help='a shuffled file for evaluators of FID, not a sheet'),
    '--precision': dict(choices=PRECISIONS, help='[of the checkpoint]'),
    '--device': dict(help='cuda or cpu [the best there is]')}


def make_parser(text, *names):
    """An argparse parser that shows the text as it is written, and a usage of one line. names: its
    options of SHARED."""
    parser = argparse.ArgumentParser(description=text, usage='%(prog)s [options], see --help',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(name, **SHARED[name])
    return parser


BUILT_IN = ('shapes', 'cifar10')        # what --data means by a name; all else is a folder
SMALL = dict(ch_mult=(1, 2, 4), z_channels=16, res_blocks=1, normalise=False)

# The columns: drawn shapes of 32 px, and other images of 32, 64 and 256 px. A size in between takes
# the column of the next smaller one. The last column is also what released files do not state.
RECIPES = {
    # Stage 1.
    'tokenizer': ('train', 'train', 'train', 'official'),
    'patch_nums': ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    'vocab_size': (256, 1024, 1024, 4096),
    'ch': (16, 32, 32, 160),
    'network': (dict(SMALL, z_channels=8), SMALL, SMALL, {}),   # what else VQVAE takes
    'tokenizer_steps': (450, 2800, 4500, 80000),
    'tokenizer_batch': (16, 16, 16, 8),
    'tokenizer_lr': (1e-3, 1e-3, 1e-3, 1e-4),
    'perceptual': (0., 0., 0., 1.),
    'adversarial': (0., 0.5, 0.5, 0.5),
    # Stage 2.
    'depth': (3, 4, 4, 16),
    'shared_aln': (False, False, False, False),
    'steps': (1750, 6600, 17000, 50000),
    'batch': (16, 32, 16, 256),
    'micro_batch': (16, 32, 16, 16),
    'lr': (5e-3, 3e-3, 3e-3, 1e-4),
    'views': (1, 1, 4, 2),
    # Both.
    'zoom': (1, 1, 1.125, 1.125),       # the shorter side of an image, divided by that of its crop
    'flip': (False, False, True, True),
    # Options of VAR.generate. The last ones are those behind the FID of Section 5.1.
    'sampling': (dict(cfg=4., top_k=20, top_p=0.), dict(cfg=6., top_k=400, top_p=0.),
                 dict(cfg=8., top_k=10, top_p=0.), dict(cfg=1.5, top_k=900, top_p=0.96))}
DEFAULTS = dict(data='shapes', classes=0, limit=0, seed=0, init='', precision=None, compile=None)

# What --resume may change: how a run ends and how fast it goes, but not what it is.
CHANGEABLE = ('steps', 'tokenizer_steps', 'lr', 'tokenizer_lr', 'micro_batch', 'precision',
              'compile')
NOT_SAVED = ('out', 'device', 'resume')


def parse(description):
    """The command line of train.py, a dict; an option that is not given is not in it."""
    parser = make_parser(f'{description}\nIn brackets: the value for drawn shapes; and those for '
                         'other images of 32, 64 and 256 px.')

    def add(name, help, kind=str, **how):
        values = RECIPES.get(name.removeprefix('--').replace('-', '_'))
        if values:
            columns = (str(value).strip('()').replace(' ', '') for value in values)
            help += f' [{"; ".join(columns)}]'
        if not {'action', 'choices'} & {*how}:
            how |= dict(type=kind, metavar='X')
        parser.add_argument(name, default=argparse.SUPPRESS, help=help, **how)

    switch = dict(action=argparse.BooleanOptionalAction)
    add('--data', 'shapes, cifar10, or a folder of images [shapes]')
    add('--size', 'side of the images [32; of a folder 256]', at_least_1)
    add('--classes', 'the first so many classes; 0: all', a_count)
    add('--limit', 'so many images of each class, at most; 0: all', a_count)
    add('--seed', 'seed of everything random [0]', a_seed)
    add('--init', 'weights to start from; with --tokenizer train stage 1 goes on with them')
    add('--out', 'folder of the run [.]', Path)
    add('--resume', f'go on with the run in --out, or begin it; may change {", ".join(CHANGEABLE)}',
        action='store_true')
    add('--tokenizer', 'train one, or official, or that of a file')
    add('--patch-nums', 'sides of the token maps', sides)
    add('--vocab-size', 'V: codes', number(int, 2, 2 ** 16))
    add('--ch', 'channels of the VQVAE at full resolution', at_least_1)
    add('--tokenizer-steps', 'steps of stage 1', a_count)
    add('--tokenizer-batch', 'images per step of stage 1, of all processes', at_least_1)
    add('--tokenizer-lr', 'peak learning rate of stage 1', nonnegative)
    add('--perceptual', 'weight of L_P in (5)', nonnegative)
    add('--adversarial', 'weight of L_G in (5), relative to the other gradients', nonnegative)
    add('--depth', 'd: width 64 d, d heads, d blocks, equation (7)', at_least_1)
    add('--steps', 'steps of stage 2; by itself it shows no image more than 300 times', a_count)
    add('--batch', 'images per step of stage 2, of all processes', at_least_1)
    add('--micro-batch', 'images per pass of stage 2: less takes less memory', at_least_1)
    add('--lr', 'peak learning rate of stage 2, whatever the batch', nonnegative)
    add('--views', 'stored crops per image: the centre, then random ones', at_least_1)
    add('--flip', 'mirror images: at random in stage 1, every second view in stage 2', **switch)
    add('--precision', '[the best of the device]', choices=PRECISIONS)
    add('--compile', 'torch.compile the blocks [on a GPU, from 1000 steps on]', **switch)
    add('--device', 'cuda or cpu [the best there is]')
    return vars(parser.parse_args())


def make_config(given):
    """The settings of a new run, an argparse.Namespace: what is given, and the rest of the recipe
    of the data and of the size of the images."""
    data = given.get('data', DEFAULTS['data'])
    size = given.get('size') or (32 if data in BUILT_IN else 256)
    column = 0 if data == 'shapes' and size == 32 else 1 + (size >= 64) + (size >= 256)
    recipe = {name: values[column] for name, values in RECIPES.items()}
    if given.get('init'):
        recipe['tokenizer'] = given['init']
    return argparse.Namespace(**{**DEFAULTS, **recipe, 'out': Path(), **given, 'size': size})


def resume_config(given, ckpt):
    """The settings of a run that goes on: those of its ckpt.pt, and those given that are
    CHANGEABLE. UserError for another value of any other option."""
    config = argparse.Namespace(**{'out': Path(), **ckpt['config'], **given})
    for name, value in given.items():
        before = ckpt['config'].get(name)
        is_too_late = name == 'tokenizer_steps' and ckpt['stage'] != 'tokenizer'
        if name not in NOT_SAVED and value != before and (is_too_late or name not in CHANGEABLE):
            raise UserError(f'--{name.replace("_", "-")} {value}: the run in {config.out} has '
                            f'{before}, and --resume cannot change it')
    return config


def chosen_labels(args, ckpt, otherwise):
    """The labels (N,) of --n images of each class of --cls: names, indices, or 'all'; without
    --cls, of the classes `otherwise`. UserError for unknown ones."""
    names = ckpt['classes']
    known = {str(i): i for i in range(len(names))}
    known.update((name, i) for i, name in enumerate(names))         # a folder may be called 7
    words = names if args.cls == ['all'] else args.cls or []
    for word in words:
        if word not in known:
            raise UserError(f'--cls {word}: no such class; there are all, 0 to {len(names) - 1}, '
                            f'{", ".join(names[:12])}')
    classes = [known[word] for word in words] or list(otherwise)
    return torch.tensor(classes).repeat_interleave(args.n)
