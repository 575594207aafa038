"""Files of weights: ckpt.pt of train.py, the released files, and those of the official trainer.

A checkpoint is a dict that states the sizes of its models: config (the settings of the run, a
dict), classes (names), stage ('tokenizer' until the tokens are made, then 'transformer'), vae and
var (state dicts); ckpt.pt also has what --resume needs.
"""
import sys
from argparse import Namespace
from pathlib import Path

import torch

from support.options import RECIPES
from support.run import LOCAL_RANK, UserError, reason, seed_of, wait_for_all
from tokenizer import VQVAE
from var import VAR

# The released tokenizer, and its sha256.
OFFICIAL = ('https://huggingface.co/FoundationVision/var/resolve/main/vae_ch160v4096z32.pth',
            '7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c')


def fetch(address, sha256, folder=Path('data')):
    """The path of a file in folder, downloaded first if it is not there. sha256 may be its first
    digits. UserError without a network, or if it is wrong: nothing is then left behind."""
    path = folder / address.split('/')[-1]
    if not path.exists() and LOCAL_RANK == 0:                   # once per machine
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(address, str(path), sha256, sys.stderr.isatty())
        except (OSError, RuntimeError) as e:
            raise UserError(f'cannot fetch {address}: {reason(e)}; bring it to {path}') from e
    wait_for_all()
    return path


def read_file(path):
    """A dict from a file of torch.save; no code in it is run. UserError for any other file."""
    try:
        return dict(torch.load(path, map_location='cpu', weights_only=True))
    except OSError as e:
        raise UserError(f'cannot read {path}: {reason(e)}') from e
    except Exception as e:                      # a damaged file can raise anything
        raise UserError(f'cannot read {path}: it is damaged, or no dict of tensors by torch.save; '
                        'what could run code is not loaded') from e


def wrap_release(vae, var):
    """The checkpoint of released state dicts, of which one may be None. What they do not state is
    measured in the transformer's tensors, or is as in the released models. Classes are called by
    their indices. A tokenizer alone does not tell its scales."""
    config = {'precision': None, **{name: values[-1] for name, values in RECIPES.items()}}
    if var is None:
        del config['patch_nums']
        return dict(config=config, classes=[], stage='tokenizer', vae=vae, var=None)
    sides = var['lvl_1L'].flatten().bincount().sqrt().long().tolist()
    config.update(patch_nums=tuple(sides), shared_aln='shared_ada_lin.1.weight' in var,
                  depth=sum(name.endswith('.attn.mat_qkv.weight') for name in var))
    classes = [str(i) for i in range(len(var['class_emb.weight']) - 1)]
    return dict(config=config, classes=classes, stage='transformer', vae=vae, var=var)


def read_checkpoint(path, tokenizer=None):
    """The checkpoint in a file, with the tokenizer in a second one, which a released transformer
    needs. UserError for other files, and if there is no tokenizer."""
    ckpt = read_file(path)
    nested = ckpt.get('trainer', {})                            # of the official trainer
    if {'vae_local', 'var_wo_ddp'} <= {*nested}:
        ckpt = wrap_release(nested['vae_local'], nested['var_wo_ddp'])
    elif {'lvl_1L', 'class_emb.weight'} <= {*ckpt}:             # a released transformer
        ckpt = wrap_release(None, ckpt)
    elif 'quantize.embedding.weight' in ckpt:                   # a released tokenizer
        ckpt = wrap_release(ckpt, None)
    elif not ({'config', 'stage', 'vae', 'var'} <= {*ckpt} and 'network' in ckpt['config']):
        raise UserError(f'{path} is no checkpoint of train.py, and no released one')
    if tokenizer:
        second = read_checkpoint(tokenizer)
        ckpt['vae'] = second['vae']
        for name in ('vocab_size', 'ch', 'network'):
            ckpt['config'][name] = second['config'][name]
    if not ckpt['vae']:
        raise UserError(f'{path} has no tokenizer: add --tokenizer vae_ch160v4096z32.pth')
    return ckpt


def build(config, classes):
    """New models of the sizes that a config states: a VQVAE, and a VAR for the classes."""
    vae = VQVAE(config.patch_nums, config.vocab_size, ch=config.ch, **config.network)
    V, z = vae.quantize.embedding.weight.shape
    return vae, VAR(vae.patch_nums, config.depth, len(classes), V, z, config.shared_aln)


def load_weights(model, weights, path):
    """Loads a state dict into a model. UserError if it does not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as e:      # a damaged file can hold anything
        raise UserError(f'{path}: not the weights of this model: {reason(e)}') from e


def load(path, tokenizer=None, device='cpu'):
    """Both models of read_checkpoint(path, tokenizer), in evaluation mode: (vae, var, ckpt).
    UserError before stage 2: var would not fit a tokenizer that is still being trained."""
    ckpt = read_checkpoint(path, tokenizer)
    if ckpt['stage'] == 'tokenizer':
        raise UserError(f'{path} has no trained transformer: finish the training by train.py '
                        '--resume, or give --ckpt a transformer')
    vae, var = build(Namespace(**ckpt['config']), ckpt['classes'])
    load_weights(vae, ckpt['vae'], tokenizer or path)
    load_weights(var, ckpt['var'], path)
    return vae.eval().to(device), var.eval().to(device), ckpt


def new_models(config, given, classes):
    """The models of a new run, on the CPU: (vae, var).

    They have the weights of --init and, for a released transformer, of the tokenizer in the file
    --tokenizer; without --init new ones, or with the tokenizer of that file. With --tokenizer train
    stage 1 goes on with them. The sizes of the files become those of the config. UserError if
    others are given, or if the transformer does not have as many classes.
    """
    torch.manual_seed(seed_of(config.seed))
    tokenizer = fetch(*OFFICIAL) if config.tokenizer == 'official' else config.tokenizer
    path = config.init or tokenizer
    if path == 'train':
        return build(config, classes)
    second = tokenizer if config.init and tokenizer not in ('train', config.init) else None
    ckpt = read_checkpoint(path, second)
    keeps_var = config.init and ckpt['stage'] == 'transformer'
    sizes = ('patch_nums', 'vocab_size', 'ch', 'network')
    for name in sizes + (('depth', 'shared_aln') if keeps_var else ()):
        value = ckpt['config'].get(name, getattr(config, name))
        if given.get(name, value) != value:
            raise UserError(f'--{name.replace("_", "-")} {given[name]}: {path} has {value}')
        setattr(config, name, value)
    vae, var = build(config, classes)
    load_weights(vae, ckpt['vae'], second or path)
    if keeps_var:
        load_weights(var, ckpt['var'], path)
    return vae, var
