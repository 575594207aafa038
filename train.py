"""Trains both stages of VAR (Fig. 4): the tokenizer, then the transformer, into one ckpt.pt.

    python train.py                                 # drawn shapes: minutes on a CPU
    python train.py --data cifar10                  # downloads CIFAR-10
    python train.py --depth 6 --data ./imagenet     # a folder of class folders, see README.md
    python train.py --resume                        # continues from ckpt.pt
    torchrun --nproc_per_node 8 -- train.py ...     # shares each batch among 8 processes

Paper: equation (5) and Section 3.2 for stage 1; Fig. 4, Section 4 and equation (6) for stage 2.
Departures from the paper and the released recipe:
- Stage 1 trains on the images of stage 2 (in the paper on OpenImages), and also has an L1 term. Its
  L_P and L_G are those of support/losses.py: L_G starts half-way through stage 1, and is left out
  for drawn shapes of 32 px. Below 256 px there is no L_P, and the tokenizer is smaller and has no
  normalisation.
- Stage 2 trains on stored tokens: of the centre crop, and of --views - 1 random crops. At 64 px and
  more, images are also mirrored. An image that is smaller than --size is enlarged to --size (in the
  release to 1.125 times --size).
- The peak learning rate depends neither on the batch nor on the depth (in the release it is 1e-4
  per 256 images, and 8e-5 from d24 up). The rate falls to 0.01 of the peak at every depth (in the
  release to 0.1 for d16 and d20). AdamW's weight decay stays at 0.05 (0.08 at the end for d30 and
  d36). Batches and the number of steps are smaller, and at 32 and 64 px the learning rates are
  larger.
- Small models are sampled with guidance 4 to 8 and top-k 10 to 400, without top-p.
What is random in a step depends on (seed, stage, step, rank) alone. On a CPU, a run that was
killed and resumed therefore ends with the same bits as one that was not. Several processes train
as one does, with three differences: each draws its own dropout, each computes lambda_G from its own
part of the batch, and dead codes restart as vectors of the first one's part.
Writes into --out: ckpt.pt, to resume from, about every minute; model.pt, the weights alone;
log.csv, all figures; reconstructions.png and samples.png; tokens, a folder of stored tokens. What
an earlier run left there, but for the pictures, is moved to previous-1.

Options are in support/options.py, and what is read and stored in support/.
Letters: B images per step, N images of a set, L tokens of all scales, l of one, K scales.
"""
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.checkpoints import load, make_models, read_state, write_state
from support.data import random_crops, read_data, step_rows
from support.grade import grade_tokenizer, grade_transformer
from support.images import batch_size, make_grid, save_image, to_tensor, to_uint8
from support.losses import AdversarialLoss, perceptual_loss
from support.options import BUILT_IN, make_config, parse
from support.run import (UserError, add_up, alone_in, choose_precision, is_out_of_memory,
                         move_aside, pick_device, precision, rank_and_world, run, seed_of, show,
                         tell, try_compiler, write_file, write_log)
from support.tokens import tokenize_both

SAVE_EVERY = 60         # seconds from one checkpoint to the next, at least
SAVING = 0.02           # share of the time that saving may take: slow disks save less often

# ---- The two stages: what is trained, on what, and by which loss ----


class TokenizerStage(nn.Module):
    """Stage 1 of Fig. 4: the VQVAE, by equation (5). train and val: ImageSets."""
    name, number = 'tokenizer', 1       # in the log, and in the seed of a step
    adversarial_from = 0.5              # the second half of the steps has L_G, too

    def __init__(self, config, vae, train, val):
        super().__init__()
        self.config, self.vae, self.train_set, self.val_set = config, vae, train, val
        self.steps = config.tokenizer_steps
        self.batch = config.tokenizer_batch
        self.lr = config.tokenizer_lr
        self.micro_batch = self.batch           # lambda_G compares gradients of a whole batch
        self.can_halve = False
        self.images = len(train)
        self.perceptual = perceptual_loss() if config.perceptual else None
        self.adversarial = None
        if config.adversarial:
            torch.manual_seed(seed_of(config.seed, self.number))    # its weights depend on it alone
            self.adversarial = AdversarialLoss(config.adversarial)

    def learned(self):
        """The modules that a checkpoint holds."""
        modules = {'vae': self.vae, 'adversarial': self.adversarial}
        return {name: module for name, module in modules.items() if module is not None}

    def batches(self, start):
        """For each step from start: the tensors of this process, on the CPU."""
        for images in random_crops(self.train_set, self.config, self.batch, start, self.steps):
            yield [images]

    def forward(self, step, images):
        """uint8 (B, H, W, 3) -> the loss (5), a scalar, and figures to show."""
        images = to_tensor(images)                                          # (B, 3, H, W)
        rebuilt, quantizer_loss = self.vae(images)
        mse = F.mse_loss(rebuilt, images)       # || im - im_hat ||, as a mean square
        # L1 is not in (5).
        loss = mse + 0.2 * F.l1_loss(rebuilt, images) + quantizer_loss      # + || f - f_hat ||
        figures = {'PSNR': -10 * torch.log10(mse.detach() / 4),             # peak to peak is 2
                   'quantizer': quantizer_loss.detach()}
        if self.perceptual is not None:
            distance = self.perceptual(rebuilt, images)                     # L_P
            loss = loss + self.config.perceptual * distance                 # + lambda_P L_P
        if self.adversarial is not None and step >= self.adversarial_from * self.steps:
            last_layer = self.vae.decoder.conv_out.weight
            adversarial, figures['lambda_G'] = self.adversarial(images, rebuilt, loss, last_layer)
            # + lambda_G L_G, and the discriminator's own loss
            loss = loss + adversarial
        return loss, figures

    @torch.no_grad()
    def evaluate(self, step):
        """Figures of validation images. Writes reconstructions.png: eight images (fewer above 256
        px), and below each its reconstructions from the first, the first two, ... and all scales.
        """
        vae, config = self.vae, self.config
        few, _ = self.val_set.some(min(8, batch_size(config.size)))         # (n, H, W, 3)
        scales = vae.decode_scales(vae.encode(to_tensor(few.to(config.device))))
        rows = [few.numpy(), *(to_uint8(x) for x in scales)]                # (n, H, W, 3) each
        save_image(config.out / 'reconstructions.png', [make_grid(rows)])
        n = 1000 if config.size <= 64 else 200
        return grade_tokenizer(vae, self.val_set, n, config.device, config.workers)[0]


class TransformerStage(nn.Module):
    """Stage 2 of Fig. 4: the transformer, by cross-entropy over the tokens of all scales, which is
    -log p of equation (6) per token.

    train and val: stored tokens (N, views, L) and labels (N,), as tokenize() returns them.
    """
    name, number = 'transformer', 2

    def __init__(self, config, vae, var, train, val):
        super().__init__()
        self.config, self.vae, self.var = config, vae, var
        self.train_set, self.val_set = train, val
        self.steps = config.steps
        self.batch = config.batch
        self.lr = config.lr
        self.images, views, _ = train[0].shape
        self.rows = self.images * views
        # A GPU starts with the whole part of this process: gradients() halves it where memory ends.
        # On a CPU the system would end the process, so that large images go eight at a time.
        part = config.batch // rank_and_world()[1]
        most = 8 if config.device.type == 'cpu' and config.size > 64 else part
        self.micro_batch = min(config.micro_batch or most, part)
        self.can_halve = True

    def learned(self):
        return {'var': self.var}

    def fetch_rows(self, stored_set, rows):
        """Tokens (n, L) int64 and labels (n,) of these rows. Row i of a stored set is view
        i % views of image i // views."""
        stored, labels = stored_set
        views = stored.shape[1]
        tokens = stored.reshape(-1, stored.shape[2])[rows].astype(np.int64)
        return torch.from_numpy(tokens), torch.from_numpy(labels[np.array(rows) // views])

    def batches(self, start):
        for pairs in step_rows(self.rows, self.batch, self.config.seed, start, self.steps):
            yield self.fetch_rows(self.train_set, [row for row, _ in pairs])

    def forward(self, step, tokens, labels):
        """tokens (B, L), labels (B,) -> the loss in nats per token, a scalar, and figures."""
        maps = tokens.split([p * p for p in self.var.patch_nums], dim=1)    # K of (B, l)
        logits, loss = self.var(labels, self.vae.var_input(maps), tokens)
        error = (logits.argmax(-1) != tokens).float().mean()    # on ImageNet 94 to 96 % is normal
        return loss, {'error': error}

    @torch.no_grad()
    def evaluate(self, step):
        """Loss and token error of validation images. Writes samples.png: eight samples of each of
        the first ten classes, two above 128 px."""
        config, rows = self.config, []
        n = 8 if config.size <= 128 else 2
        for label in range(min(10, self.var.num_classes)):
            maps = self.var.generate(self.vae, [label] * n, seed=label, **config.sampling)
            rows.append(to_uint8(self.vae.decode(maps)))                    # (n, H, W, 3)
        save_image(config.out / 'samples.png', [make_grid(rows)])
        tokens, labels = self.fetch_rows(self.val_set, range(len(self.val_set[0])))
        return grade_transformer(self.vae, self.var, tokens, labels, config.device)


# ---- One loop for both stages ----


def learning_rate(step, steps):
    """As a share of the peak: it rises from 0.005 over the first 1/50 of the run, is 1 for 5 % of
    the other steps, and then falls linearly to 0.01 at the last step. Source: the release,
    which ends at 0.1 for d16 and d20."""
    warm_up = steps / 50
    if step < warm_up:
        return 0.005 + 0.995 * step / warm_up
    progress = (step - warm_up) / max(1, steps - 1 - warm_up)
    return 1 - 0.99 * max(0, progress - 0.05) / 0.95


def make_optimizer(stage):
    """AdamW (Section 4). No weight decay on biases, weights of normalisations, positions, scale
    embeddings, AdaLN offsets and attention scales; the class embedding is decayed, as in the
    release."""
    decayed, free = [], []
    for name, p in stage.named_parameters():
        exempt = any(part in name for part in ('pos_', 'lvl_embed', 'ada_gss', 'scale_mul'))
        if p.requires_grad:
            group = free if p.ndim < 2 or exempt else decayed
            group.append(p)
    groups = [{'params': decayed, 'weight_decay': 0.05}, {'params': free, 'weight_decay': 0.}]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.95), fused=True)


def gradients(stage, step, batch, scaler):
    """The gradients of this process's part of a batch, by micro-batches. Returns its part of the
    mean loss, and figures of the last micro-batch, as scalars on the device.

    Where a pass of stage 2 runs out of GPU memory, the micro-batches are halved and the step starts
    over, with the same random numbers: no weight has changed yet.
    """
    config, rank = stage.config, rank_and_world()[0]
    while True:
        torch.manual_seed(seed_of(config.seed, stage.number, step, rank))
        stage.zero_grad()
        total = 0.
        try:
            for start in range(0, len(batch[0]), stage.micro_batch):
                part = [x[start:start + stage.micro_batch] for x in batch]
                with precision(config.device, config.precision):
                    loss, figures = stage(step, *part)
                # The parts add up to the mean over the batch of all processes.
                loss = loss * len(part[0]) / stage.batch
                scaler.scale(loss).backward()
                total = total + loss.detach()
            return {'loss': total, **figures}
        except RuntimeError as e:
            if not is_out_of_memory(e) or not stage.can_halve or stage.micro_batch == 1:
                raise
        loss = None                             # frees the pass that failed
        stage.micro_batch = math.ceil(stage.micro_batch / 2)
        print(f'out of GPU memory: {stage.micro_batch} images per pass', flush=True)


def train_stage(stage, state):
    """Trains a stage from state['step'] to its end. Each turn: evaluate, save, step, show.

    state: what ckpt.pt holds. UserError where the loss is no longer finite: ckpt.pt is then the
    last good one.
    """
    config, device, rank = stage.config, stage.config.device, rank_and_world()[0]
    optimizer = make_optimizer(stage)
    # In float16 the loss is scaled, so that small gradients do not vanish. A step whose gradients
    # are not finite is left out, and the scale is halved.
    in_float16 = choose_precision(device, config.precision) == 'float16'
    scaler = torch.amp.GradScaler(device.type, enabled=in_float16)
    if state['optimizer']:
        read_state(state, stage.learned(), optimizer, scaler)
        state['optimizer'] = None               # frees its memory
    weights = [p for group in optimizer.param_groups for p in group['params']]
    evaluate_every = max(1, stage.steps // 5)
    show_every = max(1, min(50, stage.steps // 20))

    def check(figures):
        """UserError if loss or gradient is not finite; in float16 only once the scale is down to 1,
        because a smaller one may help. Waits for a GPU."""
        finite = math.isfinite(figures['loss'] + figures['gradient norm'])
        if not finite and scaler.get_scale() <= 1:
            raise UserError(f'the loss of the {stage.name} is no longer finite: --resume with a '
                            'smaller --lr or --tokenizer-lr, or with --precision float32')

    def evaluate(step):
        # Blocks that --compile made for training would be compiled anew for the shapes of sampling.
        with precision(device, config.precision), torch.compiler.set_stance('force_eager'):
            graded = stage.eval().evaluate(step)
        stage.train()                                           # dropout is on again
        write_log(config.out / 'log.csv', stage.name, step, graded)
        show(f'{stage.name} {step}', graded)

    def save(step):
        """Writes ckpt.pt. Returns when to do it again."""
        began = time.monotonic()
        write_state(state, step, stage.learned(), optimizer, scaler, config.out / 'ckpt.pt')
        ended = time.monotonic()
        return ended + max(SAVE_EVERY, (ended - began) / SAVING)

    start = state['step']
    began = time.monotonic()
    next_save = began + SAVE_EVERY
    batches = stage.train().batches(start)
    for step in range(start, stage.steps):
        # Evaluate and save. One process does, and the others wait for its next step.
        if rank == 0 and step > start:
            if step % evaluate_every == 0:
                evaluate(step)
            if time.monotonic() > next_save:
                check(figures)
                next_save = save(step)

        # Step: gradients of all processes, clipping, AdamW. Nothing here waits for a GPU.
        for group in optimizer.param_groups:
            group['lr'] = stage.lr * learning_rate(step, stage.steps)
        batch = next(batches)
        if device.type == 'cuda':               # only a copy from pinned memory is asynchronous
            batch = [x.pin_memory() for x in batch]
        batch = [x.to(device, non_blocking=True) for x in batch]
        figures = gradients(stage, step, batch, scaler)
        learning = [p for p in weights if p.grad is not None]   # not L_G's before it starts
        add_up([p.grad for p in learning])
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(learning, 2.0)    # as in the release
        figures['gradient norm'] = norm
        scaler.step(optimizer)
        scaler.update()

        # Show. Between evaluations and checkpoints, a single process waits for the GPU only here.
        if step % show_every == 0:
            check(figures)
            add_up([figures['loss']])
            seconds = (time.monotonic() - began) / (step + 1 - start)   # per step, all included
            shown = {name: float(value) for name, value in figures.items()}
            shown['learning rate'] = optimizer.param_groups[0]['lr']
            shown['images/s'] = stage.batch / seconds
            if rank == 0:
                write_log(config.out / 'log.csv', stage.name, step,
                          {f'train {name}': value for name, value in shown.items()})
                show(f'{stage.name} {step}/{stage.steps}', shown,
                     f'{(stage.steps - step) * seconds / 60:.0f} min left')
    if rank == 0:
        if start < stage.steps:
            check(figures)
        evaluate(stage.steps)
        save(stage.steps)


# ---- The command ----


def describe(stage, model):
    """Prints the plan of a stage."""
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    times = stage.steps * stage.batch / stage.images
    tell(f'{stage.name}: {weights:.1f} M weights, {stage.steps} steps of {stage.batch}, each of '
         f'{stage.images} images {times:.3g} times, learning rate {stage.lr:g}')


def read_resumed(given):
    """What load() returns for the ckpt.pt that --resume continues. UserError if it is not that of a
    run, or if options ask for other models."""
    path = given.get('out', Path()) / 'ckpt.pt'
    resumed = load(path)
    if not {'config', 'classes', 'optimizer'} <= {*resumed[2]}:
        raise UserError(f'{path} is no ckpt.pt of a training run: nothing to resume')
    if {'init', 'tokenizer'} & {*given}:
        raise UserError(f'--resume goes on with the models of {path}: leave out --init and '
                        '--tokenizer')
    return resumed


def prepare():
    """The command line, the data and the models of a run: config; training and validation set; both
    models, on the device; and the state that ckpt.pt holds."""
    given = parse(__doc__)
    given['device'] = pick_device(given.get('device'))          # joins the other processes as well
    if given.get('compile'):
        try_compiler(given['device'])
    resumed = read_resumed(given) if given.get('resume') else None
    config = make_config(given, resumed and resumed[2]['config'])
    data, out = Path(config.data).resolve(), config.out.resolve()
    if config.data not in BUILT_IN and data in (out, *out.parents):
        raise UserError(f'--out {config.out} lies in --data {config.data}: --resume would train on '
                        'the pictures that are written there')
    train, val, classes, words = read_data(config)
    if resumed:
        before = resumed[2]['classes']
        if before != classes:
            changed = sorted({*before} ^ {*classes}) or ['their order']
            raise UserError(f'--data {config.data}: its classes have changed since this run began: '
                            f'{", ".join(changed[:5])}')
    vae, var = make_models(config, given, classes, resumed)
    if resumed:
        state = resumed[2]
    else:
        if 'steps' not in given:                # each image at most 300 times
            config.steps = min(config.steps, 300 * len(train) // config.batch)
        state = dict(classes=classes, words=words, patch_nums=vae.patch_nums,
                     sampling=config.sampling, step=0, optimizer=None,
                     stage='tokenizer' if config.tokenizer == 'train' else 'transformer')
        if config.init:
            state['var'] = var.state_dict()     # a run that is resumed does not read --init again
    state['config'] = config.settings()
    tell(f'{len(train)} + {len(val)} images of {config.size} px in {len(classes)} classes; scales '
         f'{config.patch_nums}; {rank_and_world()[1]} x {config.device}, '
         f'{choose_precision(config.device, config.precision)}')
    return config, train, val, vae.to(config.device), var.to(config.device), state


def train_both(config, train, val, vae, var, state):
    """Stage 1, the tokens, stage 2, and model.pt. A run that is killed goes on where it was."""
    rank, _ = rank_and_world()
    if state['stage'] == 'tokenizer':
        stage = TokenizerStage(config, vae, train, val).to(config.device)
        describe(stage, vae)
        train_stage(stage, state)
        state.pop('adversarial', None)
        state.update(stage='transformer', step=0, optimizer=None)
        vae.zero_grad()                         # frees the gradients
    vae.eval().requires_grad_(False)            # stage 2 leaves it as it is
    state['vae'] = vae.state_dict()
    if rank == 0 and not state['optimizer']:    # --resume is not to repeat stage 1
        write_file(config.out / 'ckpt.pt', lambda f: torch.save(state, f))

    stored, stored_val = tokenize_both(vae, train, val, config)
    unread = sorted({*train.labels.tolist()} - {*stored[1].tolist()})
    if unread:
        raise UserError(f'no training image of class {state["classes"][unread[0]]} can be read')
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


def main():
    config, *rest = prepare()
    with alone_in(config.out):
        if rank_and_world()[0] == 0 and not config.resume:
            move_aside(config.out, ('ckpt.pt', 'model.pt', 'log.csv', 'tokens'))
        train_both(config, *rest)


if __name__ == '__main__':
    run(main)
