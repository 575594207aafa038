"""What the experiments share: the data of a checkpoint, and runs that continue.

    from runs import train_or_load          # not a command
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tokenizer import UserError                                             # noqa: E402
from train import (TokenizerStage, grade_transformer, make_config,          # noqa: E402
                   make_vae, read_data, readable, seed_everything, train_stage)
from var import VERSION, load, precision, read_checkpoint                   # noqa: E402

# ---- Checkpoints of train.py ----


def open_run(path, device):
    """What another stage 2 takes from a checkpoint of train.py: the tokenizer, without gradients;
    the settings of its Config; and what sample.py needs beside the transformer, a dict.

    Raises UserError for other checkpoints.
    """
    vae, var, ckpt = load(path)
    if 'config' not in ckpt:
        raise UserError(f'{path} was not made by train.py')
    if var is None:
        raise UserError(f'the tokenizer of {path} is not complete: continue with train.py --resume')
    shared = {name: ckpt[name] for name in ('classes', 'words', 'patch_nums', 'sampling', 'vae')}
    return vae.to(device).requires_grad_(False), ckpt['config'], shared


def data_config(ckpt, size, data=None):
    """The Config that tells what a checkpoint is graded on: the data of its training, or `data`.

    size: side of its images. UserError where neither tells the data.
    """
    given = {'data': data} if data else {}
    saved = {'size': size, **ckpt.get('config', {})}
    if 'data' not in {**saved, **given}:
        raise UserError('the checkpoint does not tell its data: add --data')
    return make_config(given, saved)


def read_same_data(config, ckpt, num_classes):
    """The training and the validation ImageSet of a config, and their classes. UserError unless
    these are the num_classes of the checkpoint."""
    train, val, classes, _ = read_data(config)
    if len(classes) != num_classes or ckpt.get('classes', classes) != classes:
        raise UserError(f'--data {config.data} has other classes than the checkpoint')
    return train, val, classes


# ---- Runs of a stage ----


def train_or_load(make_stage, config, inputs=None, **more):
    """The stage that make_stage() returns, trained, in evaluation mode and without gradients.

    It is trained in config.out, continued where it was interrupted, or only loaded if ckpt.pt there
    is complete. A checkpoint with other settings is replaced. inputs: what the training also
    depends on and config does not tell. more: what else ckpt.pt is to hold.
    """
    settings, path = config.settings(), config.out / 'ckpt.pt'
    config.out.mkdir(parents=True, exist_ok=True)
    state = read_checkpoint(path) if path.exists() else {}
    if state.get('config') != settings or state.get('inputs') != inputs:
        state = dict(version=VERSION, config=settings, inputs=inputs, step=0, optimizers=None,
                     **more)
        for old in (config.out / 'log.csv', *config.out.glob('samples-*.npy')):
            old.unlink(missing_ok=True)
    seed_everything(config.seed)
    stage = make_stage()
    if state['step'] < stage.steps:
        train_stage(stage, state)
    else:
        for name, module in stage.learned().items():
            module.load_state_dict(state[name])
    return stage.eval().requires_grad_(False)


def train_tokenizer(config, train, val, change=None):
    """The VQVAE of a config, trained on two ImageSets. change: a function that changes the
    TokenizerStage before."""
    def make_stage():
        vae = make_vae(config).to(config.device)
        stage = TokenizerStage(config, vae, train, val).to(config.device)
        if change:
            change(stage)
        return stage

    return train_or_load(make_stage, config).vae


def validation_loss(stage, var):
    """Nats per token of a transformer on all validation tokens of its TransformerStage."""
    tokens, labels = stage.fetch_rows(stage.val_set, readable(stage.val_set[0]))  # (N, L), (N,)
    with precision(stage.config.device):
        return grade_transformer(stage.vae, var, tokens, labels, stage.config.device)['loss']
