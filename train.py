"""Trains both stages of VAR (Fig. 4): the tokenizer, then the transformer, into one ckpt.pt.

    python train.py                                 # drawn shapes: minutes on a CPU
    python train.py --data cifar10                  # downloads CIFAR-10
    python train.py --depth 6 --data ./imagenet     # a folder of class folders, see README.md
    python train.py --resume                        # continues from ckpt.pt
    torchrun --nproc_per_node 8 train.py ...        # shares each batch among 8 processes

Paper: equation (5) and Section 3.2 for stage 1; Fig. 4, Section 4 and equation (6) for stage 2.
Departures from the paper and the released recipe:
- Stage 1 also has an L1 term. Its L_P and L_G are those of support/losses.py: L_G starts half-way
  through it, and at 32 and 64 px there is no L_P.
- Stage 2 trains on stored tokens: of the centre crop, and of --views - 1 random crops. At 64 px
  images are also mirrored.
- The learning rate decays to 0.01 of its peak at every depth, and does not depend on the batch.
  AdamW's weight decay is 0.05. Batches and the number of steps are smaller, and at 32 and 64 px
  the learning rates are larger.
What is random in a step depends on (seed, stage, step, rank) alone. On a CPU, a run that was
killed and resumed therefore ends with the same bits as one that was not. Several processes train
as one does, with three differences: each draws its own dropout, each computes lambda_G from its own
part of the batch, and dead codes restart as vectors of the first one's part.
Writes into --out: ckpt.pt, to resume from, every minute; model.pt, the weights alone; log.csv, all
figures; reconstructions.png and samples.png; tokens-*, the stored tokens.

Letters: B images per step, N images of a set, L tokens of all scales, l of one, K scales, V codes,
z code dimension.
"""
import argparse
import math
import os
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from support.checkpoints import fetch, read_checkpoint
from support.data import cifar10_path, random_crops, read_data, spread, step_rows, tokenize
from support.images import batch_size, make_grid, psnr, save_image, to_tensor, to_uint8
from support.losses import AdversarialLoss, PerceptualLoss
from support.run import (A_SEED, PRECISIONS, UserError, a_path, choose_precision, is_out_of_memory,
                         make_parser, nfc, number, pick_device, precision, rank_and_world, reason,
                         run, say, tell, write_file, write_log)
from tokenizer import VQVAE
from var import VAR

# Addresses of what users fetch, and their sha256 or its first digits (torch.hub checks either).
VAE = ('https://huggingface.co/FoundationVision/var/resolve/main/vae_ch160v4096z32.pth',
       '7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c')
VGG = ('https://download.pytorch.org/models/vgg16-397923af.pth', '397923af')

SAVE_EVERY = 60         # seconds from one checkpoint to the next

# ---- Options ----


def option(help, kind=str, saved=True, **default):
    """A field of Config that is also an option of the command line. kind converts its text; saved
    is False where a resumed run may have another value. Without a default it is in PRESETS."""
    return field(**default, metadata={'help': help, 'kind': kind, 'saved': saved})


def sides(text):
    """'1,2,4' -> (1, 2, 4): the sides of the token maps, which have to rise."""
    values = tuple(int(part) for part in text.split(','))
    if values[0] < 1 or any(a >= b for a, b in zip(values, values[1:])):
        raise argparse.ArgumentTypeError(f'{text}: the sides of the token maps have to rise')
    return values


def as_text(value):
    """A value as the command line takes it."""
    return ','.join(map(str, value)) if isinstance(value, tuple) else str(value)


count, at_least_1, nonnegative = number(int, 0), number(int, 1), number(float, 0, 1e6)
expanded = os.path.expanduser


@dataclass(kw_only=True)
class Config:
    """Everything that defines a run, saved with its weights, and how it is run."""
    data: str = option('shapes, cifar10, or a folder of images', expanded, default='shapes')
    size: int = option('side of the images: 32, 64, 128 or 256; without it 32 for shapes and '
                       'CIFAR-10, and 256 for a folder', at_least_1, default=None)
    classes: str = option('use the first N classes, or the classes a,b,c', default='')
    limit: int = option('use at most so many images per class; 0: all', count, default=0)
    seed: int = option('seed of everything random', number(*A_SEED), default=0)

    # Stage 1.
    tokenizer: str = option('train one, use the official one, or that of a file', expanded)
    patch_nums: tuple = option('sides of the token maps, as 1,2,4', sides)
    ch: int = option('channels of the VQVAE at full resolution', at_least_1)
    vocab_size: int = option('V: codes', number(int, 2, 2 ** 16))
    network: dict = field()         # what else VQVAE takes
    tokenizer_steps: int = option('steps of stage 1', count)
    tokenizer_batch: int = option('images per step of stage 1, of all processes', at_least_1)
    tokenizer_lr: float = option('peak learning rate of stage 1', nonnegative)
    perceptual: float = option('weight of L_P in equation (5)', nonnegative)
    adversarial: float = option('weight of L_G in equation (5), relative', nonnegative)

    # Stage 2.
    depth: int = option('d: width 64 d, d heads, d blocks, equation (7)', at_least_1)
    init: str = option('a file of weights that both stages start from, for fine-tuning; add '
                       '--tokenizer FILE to keep its tokenizer as it is', expanded, default='')
    steps: int = option('steps of stage 2', count)
    batch: int = option('images per step of stage 2, of all processes', at_least_1)
    lr: float = option('peak learning rate of stage 2, whatever the batch; the paper has 1e-4 per '
                       '256 images', nonnegative)
    views: int = option('stored crops per image: the centre, then random ones', at_least_1)
    flip: bool = option('mirror at random in stage 1, and every second view in stage 2, which then '
                        'has two views at least', bool)
    sampling: dict = field()        # what suits the model: options of VAR.generate
    micro_batch: int = option('images per forward pass of stage 2; without it as many as fit',
                              at_least_1, default=None)

    # What follows does not define the run.
    out: Path = option('folder of ckpt.pt, model.pt, log.csv and images', a_path, False,
                       default=Path('.'))
    resume: bool = option('continue from ckpt.pt in --out', bool, False, default=False)
    device: str = option('cuda or cpu; without it the best there is', str, False, default=None)
    precision: str = option(f'{", ".join(PRECISIONS)}; without it the best there is', str, False,
                            default=None)
    workers: int = option('processes that read images', count, False,
                          default=min(4, (os.cpu_count() or 1) - 1))
    compile: bool = option('torch.compile the blocks of the transformer', bool, False,
                           default=False)

    def settings(self):
        """What defines the run, and is saved with its weights, as a dict."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if f.metadata.get('saved', True)}


# What depends on the size of the images; the drawn shapes have values of their own.
PRESETS = {
    'shapes': dict(
        size=32, patch_nums=(1, 2, 4, 8), tokenizer='train', ch=16, vocab_size=256,
        network=dict(ch_mult=(1, 2, 4), z_channels=8, res_blocks=1, normalise=False),
        tokenizer_steps=450, tokenizer_batch=16, tokenizer_lr=1e-3,
        perceptual=0., adversarial=0., flip=False, views=1,
        depth=3, steps=1750, batch=16, lr=5e-3,
        sampling=dict(cfg=4., top_k=20, top_p=1.)),
    '32': dict(
        size=32, patch_nums=(1, 2, 4, 8), tokenizer='train', ch=32, vocab_size=1024,
        network=dict(ch_mult=(1, 2, 4), z_channels=16, res_blocks=1, normalise=False),
        tokenizer_steps=2800, tokenizer_batch=16, tokenizer_lr=1e-3,
        perceptual=0., adversarial=0.5, flip=False, views=1,
        depth=4, steps=6600, batch=32, lr=3e-3,
        sampling=dict(cfg=6., top_k=100, top_p=1.)),
    '64': dict(
        size=64, patch_nums=(1, 2, 4, 8, 16), tokenizer='train', ch=32, vocab_size=1024,
        network=dict(ch_mult=(1, 2, 4), z_channels=16, res_blocks=1, normalise=False),
        tokenizer_steps=4500, tokenizer_batch=16, tokenizer_lr=1e-3,
        perceptual=0., adversarial=0.5, flip=True, views=4,
        depth=4, steps=17000, batch=16, lr=3e-3,
        sampling=dict(cfg=8., top_k=10, top_p=1.)),
    '128': dict(
        size=128, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), tokenizer='train', ch=96,
        vocab_size=4096, network=dict(ch_mult=(1, 1, 2, 4)),
        tokenizer_steps=20000, tokenizer_batch=32, tokenizer_lr=1e-4,
        perceptual=1., adversarial=0.5, flip=False, views=1,
        depth=16, steps=50000, batch=256, lr=1e-4,
        sampling=dict(cfg=1.5, top_k=900, top_p=0.96)),
    '256': dict(
        size=256, patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), tokenizer='official', ch=160,
        vocab_size=4096, network=dict(ch_mult=(1, 1, 2, 2, 4)),
        tokenizer_steps=80000, tokenizer_batch=8, tokenizer_lr=1e-4,
        perceptual=1., adversarial=0.5, flip=False, views=1,
        depth=16, steps=50000, batch=256, lr=1e-4,
        sampling=dict(cfg=1.5, top_k=900, top_p=0.96))}


def parse():
    """What the command line gives, as a dict; an option that is not given is not in it."""
    parser = make_parser(__doc__)
    for f in fields(Config):
        if 'help' not in f.metadata:
            continue
        text, default = f.metadata['help'], f.default
        if default is MISSING:                  # it differs by size
            values = [f'{name}: {as_text(preset[f.name])}' for name, preset in PRESETS.items()]
            text += f' [{"; ".join(values)}]'
        elif default not in (None, '', False):
            text += f' [{default}]'
        how = dict(type=f.metadata['kind'], metavar='X')
        if f.type is bool:
            # What a size can switch on, --no-... switches off.
            switch = argparse.BooleanOptionalAction if default is MISSING else 'store_true'
            how = dict(action=switch)
        parser.add_argument('--' + f.name.replace('_', '-'), default=argparse.SUPPRESS,
                            help=text, **how)
    return vars(parser.parse_args())


def make_config(given, saved):
    """The Config of a run. The command line (given) comes first, then what a resumed run had
    (saved), then the preset, then the defaults. UserError for values that do not fit together."""
    known = {f.name for f in fields(Config)}            # an older run can have others
    chosen = {name: value for name, value in saved.items() if name in known} | given
    data = chosen.get('data', Config.data)
    is_folder = data not in ('shapes', 'cifar10') and cifar10_path(data) is None
    name = str(chosen.get('size', 256 if is_folder else 32))
    if data == 'shapes' and name == '32':
        name = 'shapes'
    if name not in PRESETS:
        raise UserError(f'--size {name}: choose from 32, 64, 128, 256')
    config = Config(**{**PRESETS[name], **chosen})
    if config.precision not in (None, *PRECISIONS):
        raise UserError(f'--precision {config.precision}: choose from {", ".join(PRECISIONS)}')
    _, world = rank_and_world()
    if config.batch % world or config.tokenizer_batch % world:
        raise UserError(f'--batch {config.batch} and --tokenizer-batch {config.tokenizer_batch} '
                        f'must be multiples of the {world} processes')
    if config.flip:
        config.views = max(config.views, 2)     # the second view is the first that is mirrored
    return config


# ---- The two stages: what is trained, on what, and by which loss ----


class TokenizerStage(nn.Module):
    """Stage 1 of Fig. 4: the VQVAE, by equation (5)."""
    name, number = 'tokenizer', 1       # in the log, and in the seed of a step
    step = 0                            # set by the loop
    has_micro_batches = False           # the gradients that lambda_G compares are of a whole batch
    adversarial_from = 0.5              # the second half of the steps has L_G, too

    def __init__(self, config, vae, train, val, perceptual=None):
        super().__init__()
        self.config, self.vae, self.train_set, self.val_set = config, vae, train, val
        self.steps, self.lr = config.tokenizer_steps, config.tokenizer_lr
        self.batch = self.micro_batch = config.tokenizer_batch
        self.rows = len(train)
        self.perceptual, self.adversarial = perceptual, None
        if config.adversarial:
            self.adversarial = AdversarialLoss(config.adversarial)

    def learned(self):
        """The modules that a checkpoint holds."""
        modules = {'vae': self.vae, 'adversarial': self.adversarial}
        return {name: module for name, module in modules.items() if module is not None}

    def batches(self, start):
        """For each step from start: the tensors of this process, on the CPU."""
        for images in random_crops(self.train_set, self.config, self.batch, start, self.steps):
            yield [images]

    def forward(self, images):
        """uint8 (B, H, W, 3) -> the loss (5), a scalar, and figures to show."""
        images = to_tensor(images)                                          # (B, 3, H, W)
        rebuilt, quantizer_loss = self.vae(images)
        mse = F.mse_loss(rebuilt, images)                                   # || im - im_hat ||
        # L1 is not in (5): it keeps edges sharper.
        loss = mse + 0.2 * F.l1_loss(rebuilt, images) + quantizer_loss      # + || f - f_hat ||
        figures = {'PSNR': -10 * torch.log10(mse.detach() / 4),             # peak to peak is 2
                   'quantizer': quantizer_loss.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(rebuilt, images)                     # L_P
            loss = loss + self.config.perceptual * distance                 # + lambda_P L_P
        if self.adversarial is not None and self.step >= self.adversarial_from * self.steps:
            last_layer = self.vae.decoder.conv_out.weight
            adversarial, figures['lambda_G'] = self.adversarial(images, rebuilt, loss, last_layer)
            loss = loss + adversarial                                       # + lambda_G L_G
        return loss, figures

    @torch.no_grad()
    def evaluate(self):
        """PSNR and codebook usage on validation images. Writes reconstructions.png: eight images,
        and below each its reconstructions from the first, the first two, ... and all scales."""
        vae, device = self.vae, self.config.device
        n = 1000 if self.config.size <= 64 else 200
        images, _ = self.val_set.some(n, self.config.workers)               # (n, H, W, 3)
        few = images[spread(len(images), min(8, batch_size(self.config.size)))]
        scales = vae.decode_scales(vae.encode(to_tensor(few.to(device))))   # K of (8, 3, H, W)
        rows = [few.numpy(), *(to_uint8(x / 2 + 0.5) for x in scales)]
        save_image(self.config.out / 'reconstructions.png', [make_grid(rows)])
        decibels, hits = [], 0
        for part in images.split(batch_size(self.config.size)):
            part = to_tensor(part.to(device))                               # (B, 3, H, W)
            tokens = vae.encode(part)
            decibels.append(psnr(vae.decode(tokens), part))                 # (B,)
            hits = hits + vae.quantize.count(torch.cat(tokens, dim=1))      # (K, V)
        used = (hits.sum(0) > 0).float().mean()
        return {'PSNR': torch.cat(decibels).mean().item(), 'codebook usage': used.item()}


class TransformerStage(nn.Module):
    """Stage 2 of Fig. 4: the transformer, by cross-entropy over the tokens of all scales, which is
    -log p of equation (6) per token.

    train and val: stored tokens (N, views, L) and labels (N,), as tokenize() returns them.
    """
    name, number = 'transformer', 2
    step = 0
    has_micro_batches = True

    def __init__(self, config, vae, var, train, val):
        super().__init__()
        self.config, self.vae, self.var = config, vae, var
        self.train_set, self.val_set = train, val
        self.steps, self.lr = config.steps, config.lr
        self.batch, self.rows = config.batch, train[0].shape[0] * train[0].shape[1]
        # On a GPU the whole part of this process at first: train_step halves it until it fits. A
        # CPU tells too late that memory ends.
        part = config.batch // rank_and_world()[1]
        most = 8 if config.device.type == 'cpu' and config.size > 64 else part
        self.micro_batch = min(config.micro_batch or most, part)

    def learned(self):
        return {'var': self.var}

    def fetch_rows(self, stored_set, rows):
        """Tokens (n, L) int64 and labels (n,) of rows of the flattened (N * views)."""
        (stored, labels), views = stored_set, stored_set[0].shape[1]
        tokens = stored.reshape(-1, stored.shape[2])[rows].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(labels[np.array(rows) // views])

    def batches(self, start):
        for rows in step_rows(self.rows, self.batch, self.config.seed, start, self.steps):
            yield self.fetch_rows(self.train_set, [row for row, _ in rows])

    def forward(self, tokens, labels):
        """tokens (B, L), labels (B,) -> the loss in nats per token, a scalar, and figures."""
        maps = tokens.split([p * p for p in self.var.patch_nums], dim=1)    # K of (B, l)
        logits, loss = self.var(labels, self.vae.var_input(maps), tokens)
        error = (logits.argmax(-1) != tokens).float().mean()    # on ImageNet 94 to 96 % is normal
        return loss, {'error': error}

    def evaluate(self):
        """Loss and token error on a thousand validation images. Writes samples.png: eight samples
        of each of the first ten classes, two above 128 px."""
        config, rows = self.config, []
        n = 8 if config.size <= 128 else 2
        for label in range(min(10, self.var.num_classes)):
            images = self.var.generate(self.vae, [label] * n, seed=label, **config.sampling)
            rows.append(to_uint8(images))
        save_image(config.out / 'samples.png', [make_grid(rows)])
        tokens, labels = self.fetch_rows(self.val_set, spread(len(self.val_set[0]), 1000))
        return grade_transformer(self.vae, self.var, tokens, labels, config.device)


@torch.no_grad()
def grade_transformer(vae, var, tokens, labels, device):
    """Loss in nats per token and share of wrong tokens (Section 5.2): over all scales, for the last
    scale, and for each scale, as a dict. tokens (N, L), labels (N,)."""
    sizes = [p * p for p in var.patch_nums]
    loss, wrong = 0, 0
    for r, label in zip(tokens.split(25), labels.split(25)):
        r, label = r.to(device), label.to(device)
        logits, _ = var(label, vae.var_input(r.split(sizes, dim=1)))        # (B, L, V)
        each = F.cross_entropy(logits.transpose(1, 2), r, reduction='none') # (B, L)
        loss = loss + each.sum(0) / len(tokens)                             # (L,)
        wrong = wrong + (logits.argmax(-1) != r).sum(0) / len(tokens)       # (L,)
    figures = {}
    for name, x in (('loss', loss), ('error', wrong)):
        per_scale = [part.mean().item() for part in x.split(sizes)]
        figures[name] = x.mean().item()
        figures[f'{name} last'] = per_scale[-1]
        for k, value in enumerate(per_scale):
            figures[f'{name} {k}'] = value
    return figures


# ---- One loop for both stages ----


def learning_rate(progress):
    """As a share of the peak: warm-up over 1/50 of the run, flat to 5 %, then linear to 0.01, as in
    the release."""
    warm_up = 0.005 + 0.995 * progress / 0.02
    decay = 1 - 0.99 * max(0, progress - 0.05) / 0.95
    return min(warm_up, decay)


def make_optimizer(stage):
    """AdamW (Section 4). No weight decay on biases, gains, positions, scale embeddings, AdaLN
    offsets and attention scales; the class embedding is decayed, as in the release."""
    decayed, free = [], []
    for name, p in stage.named_parameters():
        exempt = any(part in name for part in ('pos_', 'lvl_embed', 'ada_gss', 'scale_mul'))
        if p.requires_grad:
            (free if p.ndim < 2 or exempt else decayed).append(p)
    groups = [{'params': decayed, 'weight_decay': 0.05}, {'params': free, 'weight_decay': 0.}]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.95), fused=True)


def seed_everything(*numbers):
    """Seeds torch on all devices: what is drawn next depends on the numbers alone."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def accumulate(stage, scaler, batch):
    """The gradients of this process's part of a batch, by micro-batches. Returns its part of the
    mean loss and figures of the last micro-batch, as scalars on the device."""
    total, config = 0, stage.config
    for part in zip(*(x.split(stage.micro_batch) for x in batch)):
        with precision(config.device, config.precision):
            loss, figures = stage(*part)
        # The parts add up to the mean over the batch of all processes.
        loss = loss * len(part[0]) / stage.batch
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return {'loss': total, **figures}


def train_step(stage, optimizer, scaler, batch):
    """One step of a stage: gradients, clipping, AdamW.

    batch: this process's tensors, on the CPU. Where a pass of stage 2 runs out of GPU memory, the
    micro-batches are halved and the step starts over, with the same random numbers: no weight has
    changed yet. Returns the loss of this process's part and figures, as scalars on the device:
    nothing here waits for a GPU.
    """
    config, (rank, world) = stage.config, rank_and_world()
    for group in optimizer.param_groups:
        group['lr'] = stage.lr * learning_rate(stage.step / stage.steps)
    if config.device.type == 'cuda':            # only a copy from pinned memory is asynchronous
        batch = [x.pin_memory() for x in batch]
    batch = [x.to(config.device, non_blocking=True) for x in batch]
    figures = None
    while figures is None:
        seed_everything(config.seed, stage.number, stage.step, 1 + rank)
        optimizer.zero_grad()
        try:
            figures = accumulate(stage, scaler, batch)
        except RuntimeError as e:
            if not is_out_of_memory(e) or not stage.has_micro_batches or stage.micro_batch == 1:
                raise
            stage.micro_batch = math.ceil(stage.micro_batch / 2)
            say(f'out of GPU memory: {stage.micro_batch} images per pass')
    weights = [p for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
    if world > 1:                               # summed once per step, not per micro-batch
        for p in weights:
            dist.all_reduce(p.grad)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(weights, 2.0)
    scaler.step(optimizer)
    scaler.update()
    return {**figures, 'gradient norm': norm}


SHOWN = ('loss', 'PSNR', 'codebook usage', 'error', 'images/s')     # log.csv has all figures


def show(stage, title, figures, more=''):
    """Prints the most important figures."""
    parts = [f'{name} {figures[name]:.4g}' for name in SHOWN if name in figures]
    tell('  '.join([f'{stage.name} {title}', *parts, more]))


def train_stage(stage, state):
    """Trains a stage from state['step'] to its end. Each turn: evaluate, save, step, show.

    Raises UserError where the loss is no longer finite: ckpt.pt is then the last good one.
    """
    (rank, world), config, device = rank_and_world(), stage.config, stage.config.device
    log = config.out / 'log.csv'
    optimizer = make_optimizer(stage)
    # In float16 the loss is scaled, so that small gradients do not vanish. A step whose gradients
    # are not finite is left out, and the scale is halved.
    in_float16 = choose_precision(device, config.precision) == 'float16'
    scaler = torch.amp.GradScaler(device.type, enabled=in_float16)
    if state['optimizer']:
        try:
            for name, module in stage.learned().items():
                module.load_state_dict(state[name])
            optimizer.load_state_dict(state['optimizer'])
        except (RuntimeError, ValueError, KeyError) as e:
            raise UserError(f'ckpt.pt does not fit these options: {reason(e)}') from e
        if state['scaler']:
            scaler.load_state_dict(state['scaler'])
        state['optimizer'] = None               # frees its memory

    def check(figures):
        """UserError if the last step's figures are not finite, in float16 even with the scale 1.
        Waits for a GPU."""
        finite = math.isfinite(figures['loss'] + figures['gradient norm'])
        if not finite and scaler.get_scale() <= 1:
            raise UserError(f'the loss of the {stage.name} is no longer finite: --resume with a '
                            'smaller --lr or --tokenizer-lr')

    evaluate_every, show_every = max(1, stage.steps // 5), max(1, min(50, stage.steps // 20))
    start, began, figures = state['step'], time.time(), None
    next_save = began + SAVE_EVERY
    batches = stage.train().batches(start)
    for step in range(start, stage.steps + 1):
        stage.step, last = step, step == stage.steps

        # Evaluate. One process does, and the others wait for its next step.
        if rank == 0 and (last or step > 0 and step % evaluate_every == 0):
            with precision(device, config.precision):
                graded = stage.eval().evaluate()
            stage.train()                                       # dropout is on again
            write_log(log, stage.name, step, graded)
            show(stage, step, graded)

        # Save.
        if rank == 0 and (last or time.time() > next_save):
            if figures:
                check(figures)
            for name, module in stage.learned().items():
                state[name] = module.state_dict()
            state.update(step=step, optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            write_file(config.out / 'ckpt.pt', lambda f: torch.save(state, f))
            next_save = time.time() + SAVE_EVERY
        if last:
            break

        # Step.
        figures = train_step(stage, optimizer, scaler, next(batches))

        # Show. Between evaluations and checkpoints, a single process waits for the GPU only here.
        if step % show_every == 0:
            check(figures)
            if world > 1:
                dist.all_reduce(figures['loss'])
            if rank == 0:
                seconds = (time.time() - began) / (step + 1 - start)    # per step, all included
                figures = {name: float(value) for name, value in figures.items()}
                figures['learning rate'] = optimizer.param_groups[0]['lr']
                figures['images/s'] = stage.batch / seconds
                write_log(log, stage.name, step,
                          {f'train {name}': value for name, value in figures.items()})
                show(stage, f'{step}/{stage.steps}', figures,
                     f'{(stage.steps - step) * seconds / 60:.0f} min left')


# ---- Models to train, and the command ----


def tokenizer_file(config, state):
    """Where the tokenizer comes from, and what is in that file: '' and {} for a new one.

    A resumed run has the one in its ckpt.pt (state). Otherwise --tokenizer decides; 'train' with
    --init starts from that of --init.
    """
    if state:
        return 'ckpt.pt', state
    path = config.tokenizer
    if path == 'train':
        path = config.init
    elif path == 'official':
        path = fetch(*VAE)
    return path, read_checkpoint(path) if path else {}


def make_vae(config, path='', weights=None):
    """The tokenizer: a new one, or one with the weights that were read from path. UserError if it
    does not fit the options."""
    if not path:
        vae = VQVAE(config.patch_nums, config.vocab_size, ch=config.ch, **config.network)
        # All codes are 0 at first, so that f_hat stays 0 and every scale sees the shrunk f. The
        # first update replaces them: one by the mean of all vectors, the others by random vectors.
        vae.quantize.embedding.weight.zero_()
    elif weights is None:
        raise UserError(f'{path} has no tokenizer')
    else:
        try:
            vae = VQVAE.from_state_dict(weights, config.patch_nums)
        except Exception as e:                  # the shapes of another file can be anything
            raise UserError(f'{path} is no tokenizer for --patch-nums {config.patch_nums}: '
                            f'{reason(e)}') from e
    if vae.image_size != config.size:
        raise UserError(f'--size {config.size}: with --patch-nums {config.patch_nums} the '
                        f'tokenizer {path} makes images of {vae.image_size} px')
    return vae


def make_var(config, vae, num_classes, init=''):
    """The transformer: a new one, or one with the weights of the file `init`. Those of a resumed
    run are loaded by train_stage."""
    V, z = vae.quantize.embedding.weight.shape
    var = VAR(config.patch_nums, config.depth, num_classes, V, z)
    weights = read_checkpoint(init).get('var') if init else None
    if weights:
        fresh, known = var.class_emb.weight.detach(), weights['class_emb.weight']   # (classes+1, w)
        # Another number of classes gets new class embeddings; "no class" keeps its own.
        if known.shape[1:] == fresh.shape[1:] and len(known) != len(fresh):
            weights['class_emb.weight'] = torch.cat([fresh[:-1], known[-1:]])
        try:
            var.load_state_dict(weights)
        except RuntimeError as e:
            raise UserError(f'--init {init}: {reason(e)}; it needs the --depth, the --patch-nums '
                            'and the tokenizer that it was trained with') from e
    return var


def new_state(config, classes, words):
    """The state of a run that begins. What an older run left in --out is moved aside."""
    if rank_and_world()[0] == 0:
        for name in ('ckpt.pt', 'log.csv'):
            path = config.out / name
            if path.exists():
                path.replace(path.with_suffix('.previous' + path.suffix))
    stage = 'tokenizer' if config.tokenizer == 'train' else 'transformer'
    return dict(classes=classes, words=words, patch_nums=config.patch_nums,
                sampling=config.sampling, stage=stage, step=0, optimizer=None)


def describe(stage, model):
    """Prints the plan of a stage; warns where an example, a view of an image, is seen too often."""
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    times = stage.steps * stage.batch / stage.rows
    tell(f'{stage.name}: {weights:.1f} M weights, {stage.steps} steps of {stage.batch} images, '
         f'{times:.3g} epochs of {stage.rows} examples, learning rate {stage.lr:g}')
    if times > 1000:
        tell(f'warning: every example is seen {times:.0f} times: fewer steps will do')


def train_stage_1(config, vae, train, val, state):
    """Trains the tokenizer from state['step'] on. In the end, state is that of stage 2's start."""
    perceptual = None
    if config.perceptual:
        path = fetch(*VGG)
        try:
            perceptual = PerceptualLoss(read_checkpoint(path))
        except RuntimeError as e:
            raise UserError(f'{path} is not the VGG-16 of torchvision') from e
    seed_everything(config.seed)                # the same discriminator, whatever was drawn before
    stage = TokenizerStage(config, vae, train, val, perceptual).to(config.device)
    describe(stage, vae)
    train_stage(stage, state)
    state.pop('adversarial', None)
    state.update(stage='transformer', step=0, optimizer=None)       # where --resume continues
    vae.zero_grad()                             # frees the gradients


def main():
    given, state = parse(), {}
    given['device'] = pick_device(given.get('device'))          # joins the other processes as well
    if 'resume' in given:
        path = given.get('out', Path()) / 'ckpt.pt'
        state = read_checkpoint(path)
        if not isinstance(state.get('config'), dict) or 'optimizer' not in state:
            raise UserError(f'{path} was not made by this train.py: nothing to resume')
    config = make_config(given, state.get('config', {}))
    (rank, world), device = rank_and_world(), config.device
    data, out = Path(config.data).resolve(), config.out.resolve()
    if data.is_dir() and data in (out, *out.parents) and not cifar10_path(data):
        raise UserError(f'--out {config.out} lies in --data {config.data}: --resume would train on '
                        'the pictures that are written there')
    train, val, classes, words = read_data(config)
    before, now = [*map(nfc, state.get('classes', classes))], [*map(nfc, classes)]
    if before != now:
        changed = sorted({*before} ^ {*now}) or ['their order']
        raise UserError(f'--data {config.data}: its classes have changed since this run began: '
                        f'{", ".join(changed[:5])}')
    start_from = [Path(config.init).resolve(), Path(config.tokenizer).resolve()]
    if not state and (config.out / 'ckpt.pt').resolve() in start_from:
        raise UserError(f'{config.out / "ckpt.pt"} would be moved aside: give model.pt, or --out')
    path, file = tokenizer_file(config, state)
    # The file of the released tokenizer does not have its scales.
    scales = tuple(file.get('patch_nums', config.patch_nums))
    if given.get('patch_nums', scales) != scales:
        raise UserError(f'--patch-nums: the tokenizer {path} was trained with {scales}')
    config.patch_nums = scales
    tell(f'{len(train)} + {len(val)} images of {config.size} px in {len(classes)} classes; scales '
         f'{config.patch_nums}; {world} x {device}, {choose_precision(device, config.precision)}')
    seed_everything(config.seed)
    vae = make_vae(config, path, file.get('vae')).to(device)
    seed_everything(config.seed)                # var starts the same, whatever make_vae drew
    # Before stage 2 begins, a resumed run has no transformer yet.
    var = make_var(config, vae, len(classes), '' if 'var' in state else config.init).to(device)
    config.out.mkdir(parents=True, exist_ok=True)
    state = state or new_state(config, classes, words)
    state['config'] = config.settings()

    if state['stage'] == 'tokenizer':
        train_stage_1(config, vae, train, val, state)
    vae.eval().requires_grad_(False)            # stage 2 leaves it as it is
    state['vae'] = vae.state_dict()
    if rank == 0 and not state['optimizer']:    # a run that is killed now goes on from here
        write_file(config.out / 'ckpt.pt', lambda f: torch.save(state, f))

    stored = tokenize(vae, train, config, 'train', config.views)
    stored_val = tokenize(vae, val, config, 'val')
    unread = sorted({*train.labels.tolist()} - {*stored[1].tolist()})
    if unread:
        raise UserError(f'no training image of class {classes[unread[0]]} can be read')
    if config.compile:
        for block in var.blocks:
            block.compile()
    stage = TransformerStage(config, vae, var, stored, stored_val)
    describe(stage, var)
    train_stage(stage, state)
    if rank == 0:
        names = ('config', 'classes', 'words', 'patch_nums', 'sampling', 'vae', 'var')
        final = {name: state[name] for name in names}
        write_file(config.out / 'model.pt', lambda f: torch.save(final, f))
        tell(f'wrote {config.out / "model.pt"}, the weights alone, and samples.png')


if __name__ == '__main__':
    run(main)
