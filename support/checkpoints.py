"""Files of weights: the released ones, those of the official trainer, and those of train.py."""
import math
import os
import pickle
import sys
from pathlib import Path

import torch
import torch.nn as nn

from support.options import RELEASED_SAMPLING, RELEASED_SCALES
from support.run import UserError, reason, seed_of, tell, wait_for_all, write_file
from tokenizer import VQVAE
from var import VAR

# The released tokenizer, and its sha256.
OFFICIAL = ('https://huggingface.co/FoundationVision/var/resolve/main/vae_ch160v4096z32.pth',
            '7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c')


def fetch(address, sha256, folder=Path('data')):
    """The path of a file in folder, downloaded first if it is not there. sha256 may be its first
    digits.

    Raises UserError without a network, or if the checksum is wrong: nothing is then left behind.
    """
    path = folder / address.split('/')[-1]
    if not path.exists() and os.environ.get('LOCAL_RANK', '0') == '0':      # once per machine
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), sha256, sys.stderr.isatty())
        except (OSError, RuntimeError) as e:
            raise UserError(f'cannot fetch {address}: {reason(e)}; bring it to {path}') from e
    wait_for_all()
    return path


def read_checkpoint(path):
    """A dict from a file of torch.save; no code in it is run. Models are under 'vae' and 'var'.

    Reads ckpt.pt and model.pt of train.py, the released files, and checkpoints of the official
    trainer. Raises UserError for a file that is no dict of torch.save.
    """
    try:
        ckpt = dict(torch.load(path, map_location='cpu', weights_only=True))
        if 'lvl_1L' in ckpt:                                    # a released transformer
            return {'var': ckpt}
        if 'quantize.embedding.weight' in ckpt:                 # a released tokenizer
            return {'vae': ckpt}
        if 'trainer' in ckpt:                                   # both, from the official trainer
            ckpt = {'vae': ckpt['trainer']['vae_local'], 'var': ckpt['trainer']['var_wo_ddp']}
        return ckpt
    except OSError as e:
        raise UserError(f'cannot read {path}: {reason(e)}') from e
    except pickle.UnpicklingError as e:
        raise UserError(f'cannot read {path}: it is damaged, or holds more than tensors, which is '
                        'not loaded because it could run code: save the state_dict alone') from e
    except Exception as e:                      # a damaged file can raise anything
        raise UserError(f'cannot read {path}: it is damaged, or no checkpoint of torch.save') from e


def load(path, tokenizer=None, scales=RELEASED_SCALES):
    """Both models of a checkpoint: (vae, var or None, ckpt), on the CPU, in evaluation mode.

    path: ckpt.pt or model.pt of train.py, or a released file. tokenizer: a second file, with the
    tokenizer that a released transformer needs. scales: sides of the token maps, for
    files that do not have them. ckpt always has 'sampling', the options for VAR.generate. Raises
    UserError where a file is of another kind, or the two do not fit.
    """
    ckpt = {'patch_nums': scales, 'sampling': RELEASED_SAMPLING, **read_checkpoint(path)}
    own = ckpt.get('vae')       # what a transformer was trained with; a released file has none
    if tokenizer:
        ckpt['vae'] = read_checkpoint(tokenizer).get('vae')
    if not ckpt.get('vae'):
        raise UserError(f'{tokenizer or path} has no tokenizer: with a released transformer, add '
                        '--tokenizer vae_ch160v4096z32.pth')
    var = None
    try:
        if ckpt.get('var'):
            var = VAR.from_state_dict(ckpt['var']).eval()
            ckpt['patch_nums'] = var.patch_nums
        vae = VQVAE.from_state_dict(ckpt['vae'], ckpt['patch_nums']).eval()
        ckpt['vae'] = vae.state_dict()
        codes = vae.quantize.embedding.weight                               # (V, z)
        fits = var is None or (var.vocab_size, var.word_embed.in_features) == codes.shape
        if var and own:
            fits = fits and torch.equal(own['quantize.embedding.weight'], codes)
    except Exception as e:                      # the shapes of a damaged file can be anything
        raise UserError(f'{path}: not the weights of this model: {reason(e)}') from e
    if not fits:
        raise UserError(f'the transformer of {path} was trained with another tokenizer than that '
                        f'of {tokenizer or path}')
    return vae, var, ckpt


def make_models(config, given, classes, resumed=None):
    """The tokenizer and the transformer of a run of train.py, on the CPU: (vae, var).

    |                               | tokenizer                         | transformer          |
    |-------------------------------|-----------------------------------|----------------------|
    | --tokenizer train             | new                               | new                  |
    | --tokenizer official or FILE  | of that file                      | new                  |
    | --init FILE                   | of FILE                           | of FILE, or new      |
    | --init FILE --tokenizer OTHER | of OTHER: that of FILE's training | of FILE, or new      |
    | --init FILE --tokenizer train | of FILE; stage 1 goes on from it  | of FILE, or new      |
    | --resume                      | of ckpt.pt                        | of ckpt.pt, or new   |

    "Or new" is for a file without a transformer, as ckpt.pt is in stage 1.
    given: what the command line says; classes: names; resumed: what load() returned for ckpt.pt.
    Values that the weights in a file fix (patch_nums, vocab_size, depth, ch) are set in `config`.
    UserError if others were given, or where a file does not have what it should.
    """
    vae = var = None
    tokenizer = config.tokenizer
    if tokenizer == 'official' and not resumed:
        tokenizer = fetch(*OFFICIAL)
    source = 'the tokenizer'
    if resumed:
        source = config.out / 'ckpt.pt'
        vae, var, _ = resumed
    elif config.init:
        source = config.init
        second = None if tokenizer in ('train', config.init) else tokenizer
        vae, var, ckpt = load(config.init, second, config.patch_nums)
        if var is None:
            tell(f'{config.init} has no transformer: it will be a new one')
        else:
            torch.manual_seed(seed_of(config.seed))
            rename_classes(var, ckpt.get('classes', []), classes)
    elif tokenizer != 'train':
        source = tokenizer
        vae, _, _ = load(tokenizer, scales=config.patch_nums)
    if vae is None:
        torch.manual_seed(seed_of(config.seed))
        vae = VQVAE(config.patch_nums, config.vocab_size, ch=config.ch, **config.network)
    V, z = vae.quantize.embedding.weight.shape
    if var is None:
        torch.manual_seed(seed_of(config.seed))     # the same weights with any tokenizer
        var = VAR(vae.patch_nums, config.depth, len(classes), V, z)
    if vae.image_size != config.size:
        raise UserError(f'--size {config.size}: with the scales {vae.patch_nums} {source} makes '
                        f'images of {vae.image_size} px')
    told = dict(patch_nums=vae.patch_nums, vocab_size=V, depth=len(var.blocks),
                ch=vae.encoder.conv_in.out_channels)
    for name, value in told.items():
        if given.get(name, value) != value:
            raise UserError(f'--{name.replace("_", "-")} {given[name]}: {source} has {value}')
        setattr(config, name, value)
    return vae, var


def class_indices(classes, known, num_classes):
    """The index in a transformer of each class of some data, or None where it does not know the
    class: a list.

    known: the transformer's names of its num_classes classes. Without names, or for a single class,
    class i of the data is class i of the transformer, if they have equally many.
    """
    if len(classes) == num_classes and (not known or num_classes == 1):
        if not known:
            tell('the weights do not name their classes: their class i is taken for the i-th of '
                 f'{", ".join(classes[:5])}{", ..." if len(classes) > 5 else ""}')
        return list(range(num_classes))
    return [known.index(name) if name in known else None for name in classes]


def rename_classes(var, known, classes):
    """Gives a transformer other classes: those that it knows keep their embeddings, the others get
    new ones."""
    old, indices = var.class_emb.weight, class_indices(classes, known, var.num_classes)
    w = old.shape[1]
    var.num_classes = len(classes)
    var.class_emb = nn.Embedding(len(classes) + 1, w)
    with torch.no_grad():
        nn.init.trunc_normal_(var.class_emb.weight, std=math.sqrt(1 / (3 * w)))     # as VAR does
        for i, index in enumerate(indices):
            if index is not None:
                var.class_emb.weight[i] = old[index]
        var.class_emb.weight[-1] = old[-1]                                  # "no class"
    new = [name for name, index in zip(classes, indices) if index is None]
    if new:
        tell(f'{len(new)} of {len(classes)} classes are new to the transformer: '
             f'{", ".join(new[:5])}')


def write_state(state, step, modules, optimizer, scaler, path):
    """Writes the state that a run has before `step` to path: ckpt.pt. modules: {name: module}."""
    for name, module in modules.items():
        state[name] = module.state_dict()
    state.update(step=step, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
    write_file(path, lambda f: torch.save(state, f))


def read_state(state, modules, optimizer, scaler):
    """Sets modules, optimizer and scaler to what write_state() has written."""
    try:
        for name, module in modules.items():
            module.load_state_dict(state[name])
        optimizer.load_state_dict(state['optimizer'])
        if state['scaler']:                                     # the precision can have changed
            scaler.load_state_dict(state['scaler'])
    except (RuntimeError, ValueError, KeyError) as e:
        raise UserError(f'ckpt.pt does not fit these options: {reason(e)}') from e
