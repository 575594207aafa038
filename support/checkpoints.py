"""Files of weights: the released ones, those of the official trainer, and those of train.py."""
import os
import pickle
import sys
from pathlib import Path

import torch

from support.run import UserError, reason, wait_for_all
from tokenizer import VQVAE
from var import VAR

# What the released files do not contain: the tokenizer's scales, and the sampling behind the FID of
# Section 5.1 (top-k is 600 in Table 3).
RELEASED = {'patch_nums': (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
            'sampling': {'cfg': 1.5, 'top_k': 900, 'top_p': 0.96}}


def fetch(address, sha256, folder=Path('data')):
    """The path of a file in folder, downloaded first if it is not there.

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


def unwrap(weights):
    """A state dict without the prefixes that torch.compile and DistributedDataParallel add."""
    for prefix in ('module.', '_orig_mod.', 'module.'):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def read_checkpoint(path):
    """A dict from a file of torch.save; no code in it is run. Models are under 'vae' and 'var'.

    Reads ckpt.pt and model.pt of train.py, the released files, and checkpoints of the official
    trainer. Raises UserError for a file that is no dict of torch.save.
    """
    path = os.fspath(path)
    try:
        with open(path, 'rb') as f:
            head = f.read(9)
    except OSError as e:
        raise UserError(f'cannot read {path}: {reason(e)}') from e
    if head[8:] == b'{':                        # safetensors: a length of 8 bytes, then JSON
        raise UserError(f"{path} is a safetensors file: convert it by torch.save(safetensors.torch"
                        f".load_file('{path}'), 'weights.pt'), from the safetensors package")
    try:
        ckpt = unwrap(dict(torch.load(path, map_location='cpu', weights_only=True)))
        if 'lvl_1L' in ckpt:                                    # a released transformer
            return {'var': ckpt}
        if 'quantize.embedding.weight' in ckpt:                 # a released tokenizer
            return {'vae': ckpt}
        if 'trainer' in ckpt:                                   # both, from the official trainer
            ckpt = {'vae': ckpt['trainer']['vae_local'], 'var': ckpt['trainer']['var_wo_ddp']}
        for name in ('vae', 'var'):
            if name in ckpt:
                ckpt[name] = unwrap(ckpt[name])
        return ckpt
    except pickle.UnpicklingError as e:
        raise UserError(f'cannot read {path}: it is damaged, or holds more than tensors, which is '
                        'not loaded because it could run code: save the state_dict alone') from e
    except Exception as e:                      # a damaged file can raise anything
        raise UserError(f'cannot read {path}: it is damaged, or no checkpoint of torch.save') from e


def load(path, tokenizer=None):
    """Both models of a checkpoint: (vae, var or None, ckpt), on the CPU, in evaluation mode.

    path: ckpt.pt or model.pt of train.py, or a released transformer. tokenizer: a second file with
    the tokenizer, which a released transformer needs. ckpt always has 'sampling', the options for
    VAR.generate. Raises UserError where a file is of another kind, or the two do not fit.
    """
    ckpt = {**RELEASED, **read_checkpoint(path)}
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
    except Exception as e:                      # the shapes of a damaged file can be anything
        raise UserError(f'{path}: not the weights of this model: {reason(e)}') from e
    codes = vae.quantize.embedding.weight.shape                             # (V, z)
    if var and (var.vocab_size, var.word_embed.in_features) != codes:
        raise UserError(f'the transformer of {path} was trained with another tokenizer than that '
                        f'of {tokenizer or path}')
    return vae, var, ckpt
