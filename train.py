"""Trains both stages of VAR (Fig. 4): the tokenizer, then the transformer, into one ckpt.pt.

    python train.py                                 # drawn shapes: minutes on a CPU
    python train.py --data cifar10                  # downloads CIFAR-10
    python train.py --depth 6 --data ./imagenet     # a folder of class folders, see README.md
    python train.py --resume                        # goes on with the run in this folder
    torchrun --nproc_per_node 8 -- train.py ...     # shares each batch among 8 processes

Paper: equation (5) and Section 3.2 for stage 1; Fig. 4, Section 4 and equation (6) for stage 2.
README.md lists where this differs from the paper and the released recipe.

A run is a folder, --out: ckpt.pt, written at least every five minutes, which sample.py reads and
--resume goes on from; tokens.npz, all that stage 2 reads; log.csv; two pictures. What is random in
a step depends on (seed, stage, step, rank) and --micro-batch alone, so that on a CPU a run that was
killed and resumed ends with the same bits as one that was not. Several processes train as one does,
but each draws its own dropout, each computes lambda_G from its own part of the batch, and dead
codes restart as vectors of the first one's part.

Reduced to the essentials, the loop of train_stage() is:

    for step, batch in enumerate(stage.batches(0)):
        for group in optimizer.param_groups:
            group['lr'] = stage.lr * learning_rate(step, stage.steps)
        loss, _ = stage(step, *batch)           # forward: (5), or the cross-entropy of (6)
        loss.backward()
        clip_grad_norm_(stage.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()

Letters: B images per step, N images of a set, L tokens of all scales, l of one, K scales.
"""
import math
import time
from importlib.util import find_spec
from pathlib import Path

import support                                  # before torch: see there
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.checkpoints import build, fetch, load_weights, new_models, read_checkpoint, read_file
from support.data import read_data, read_tokens, spread, step_rows, write_tokens
from support.grade import grade_tokenizer, grade_transformer
from support.images import crop, make_grid, read_all, save_image, to_tensor, to_uint8
from support.losses import VGG, AdversarialLoss, PerceptualLoss
from support.options import NOT_SAVED, make_config, parse, resume_config
from support.run import (UserError, agree, all_reduce, autocast, choose_precision, pick_device,
                         rank_and_world, run, seed_of, show, tell, wait_for_all, write_file,
                         write_log)

SAVE_EVERY = 300        # seconds from one ckpt.pt to the next
GRADED = 1000           # validation images, at most
SHOWN = ('loss', 'PSNR', 'codebook usage', 'error', 'images/s')     # log.csv has all figures

# ---- The two stages: what is trained, on what, and by which loss ----


class TokenizerStage(nn.Module):
    """Stage 1 of Fig. 4: the VQVAE, by equation (5). train, val: lists of uint8 (h, w, 3)."""
    name, number = 'tokenizer', 1       # in the log, and in the seed of a step

    def __init__(self, config, vae, train, val):
        super().__init__()
        self.config, self.vae, self.train_set, self.val_set = config, vae, train, val
        self.steps, self.lr = config.tokenizer_steps, config.tokenizer_lr
        self.batch = self.micro_batch = config.tokenizer_batch  # undivided: a lambda_G per step
        self.perceptual = PerceptualLoss(read_file(fetch(*VGG))) if config.perceptual else None
        self.learned, self.adversarial = {'vae': vae}, None     # what a checkpoint holds
        if config.adversarial:
            torch.manual_seed(seed_of(config.seed, self.number))    # its weights depend on it alone
            self.adversarial = AdversarialLoss(config.adversarial)
            self.learned['adversarial'] = self.adversarial

    def batches(self, start):
        """For each step from start: the tensors of this process, on the CPU. Crops are random, and
        with --flip so is whether they are mirrored."""
        config, n, (rank, world) = self.config, len(self.train_set), rank_and_world()
        for step, rows in step_rows(n, self.batch, config.seed, start, self.steps):
            rng = np.random.default_rng((config.seed, self.number, step))
            spots, mirrored = rng.random((self.batch, 2)), rng.random(self.batch) < 0.5
            crops = []
            for i in range(rank, self.batch, world):
                pixels = crop(self.train_set[rows[i]], config.size, spots[i])
                crops.append(pixels[:, ::-1] if config.flip and mirrored[i] else pixels)
            yield [torch.from_numpy(np.stack(crops))]                       # (B, H, W, 3)

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
        if self.adversarial is not None and step >= self.steps / 2:         # in the second half
            last_layer = self.vae.decoder.conv_out.weight
            adversarial, figures['lambda_G'] = self.adversarial(images, rebuilt, loss, last_layer)
            # + lambda_G L_G, and the discriminator's own loss
            loss = loss + adversarial
        return loss, figures

    @torch.no_grad()
    def evaluate(self):
        """Figures of validation images. Writes reconstructions.png: eight of them, and below each
        its reconstructions from the first, the first two, ... and all scales."""
        vae, config, N = self.vae, self.config, len(self.val_set)
        few = spread(N, 8)
        images = np.stack([crop(self.val_set[row], config.size) for row in few])    # (n, H, W, 3)
        x = to_tensor(torch.from_numpy(images).to(config.device))           # (n, 3, H, W)
        rows = [images, *(to_uint8(x_k) for x_k in vae.decode_scales(vae.encode(x)))]
        save_image(config.out / 'reconstructions.png', make_grid(rows))
        return grade_tokenizer(vae, [list(enumerate(self.val_set))], config.device)[0]


class TransformerStage(nn.Module):
    """Stage 2 of Fig. 4: the transformer, by cross-entropy over the tokens of all scales, -log p of
    equation (6) per token. train, val: stored tokens uint16 (N, L) and labels int64 (N,)."""
    name, number = 'transformer', 2

    def __init__(self, config, vae, var, train, val):
        super().__init__()
        # Without gradients, the tokenizer is no part of the optimizer.
        self.config, self.vae, self.var = config, vae.eval().requires_grad_(False), var
        self.train_set, self.val_set, self.learned = train, val, {'var': var}
        self.steps, self.lr = config.steps, config.lr
        self.batch, self.micro_batch = config.batch, config.micro_batch

    def batches(self, start):
        """For each step from start: tokens (B, L) and labels (B,) of this process, on the CPU."""
        (rank, world), n = rank_and_world(), len(self.train_set[1])
        for _, rows in step_rows(n, self.batch, self.config.seed, start, self.steps):
            yield [torch.from_numpy(x[rows[rank::world]].astype(np.int64)) for x in self.train_set]

    def forward(self, step, tokens, labels):
        """tokens (B, L), labels (B,) -> the loss in nats per token, a scalar, and figures."""
        maps = tokens.split([p * p for p in self.var.patch_nums], dim=1)    # K of (B, l)
        logits, loss = self.var(labels, self.vae.var_input(maps), tokens)
        error = (logits.argmax(-1) != tokens).float().mean()    # on ImageNet 94 to 96 % is normal
        return loss, {'error': error}

    @torch.no_grad()
    def evaluate(self):
        """Loss and token error of validation images. Writes samples.png: eight samples of each of
        the first ten classes."""
        config, rows = self.config, []
        for label in range(min(10, self.var.num_classes)):
            maps = self.var.generate(self.vae, [label] * 8, seed=label, **config.sampling)
            maps[-1] = maps[-1].clamp_min(0)    # -1 after an overflow, which later steps can mend
            rows.append(to_uint8(self.vae.decode(maps)))                    # (n, H, W, 3)
        save_image(config.out / 'samples.png', make_grid(rows))
        tokens, labels = (torch.from_numpy(x.astype(np.int64)) for x in self.val_set)
        return grade_transformer(self.vae, self.var, tokens, labels, config.device)


# ---- One loop for both stages ----


def learning_rate(step, steps):
    """As a share of the peak: it rises from 0.005 over the first 1/50 of the run, is 1 for 5 % of
    the other steps, and then falls linearly to 0.01 at the last step. Source: the release."""
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
    """Seeds a step, and computes the gradients of this process's part of a batch, by micro-batches.
    Returns its part of the mean loss, and figures of the last one, as scalars on the device."""
    config, rank = stage.config, rank_and_world()[0]
    torch.manual_seed(seed_of(config.seed, stage.number, step, rank))
    stage.zero_grad()
    total = 0.
    for start in range(0, len(batch[0]), stage.micro_batch):
        part = [x[start:start + stage.micro_batch] for x in batch]
        with autocast(config.device, config.precision):
            loss, figures = stage(step, *part)
        # The parts add up to the mean over the batch of all processes.
        loss = loss * len(part[0]) / stage.batch
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return {'loss': total, **figures}


def train_stage(stage, state):
    """Trains a stage from state['step'] to its end. Each turn: step, show, evaluate, save. state:
    what ckpt.pt holds, kept up to date by the first process. UserError where the loss is no longer
    finite, or if there are more processes than images in a batch."""
    config, device, (rank, world) = stage.config, stage.config.device, rank_and_world()
    if stage.batch < world:
        raise UserError(f'a batch of {stage.batch} images is too small for {world} processes')
    precision = choose_precision(device, config.precision)
    stage.to(device).train()
    optimizer = make_optimizer(stage)
    # In float16 the loss is scaled, so that small gradients do not vanish. A step whose gradients
    # are not finite is left out, and the scale is halved.
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'float16')
    if state['optimizer']:
        for name, module in stage.learned.items():
            load_weights(module, state[name], 'ckpt.pt')
        optimizer.load_state_dict(state['optimizer'])
        if state['scaler']:                                     # the precision can have changed
            scaler.load_state_dict(state['scaler'])
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    tell(f'{stage.name}: {sum(p.numel() for p in parameters) / 1e6:.1f} M weights, {stage.steps} '
         f'steps of {stage.batch} images, on {world} x {device} in {precision}')

    def check_finite():
        """Ends the run if the last step was not finite; in float16 only once the scale is down to
        1, because a smaller one may help. Waits for a GPU."""
        finite = math.isfinite(figures['loss'] + figures['gradient norm'])
        if not finite and scaler.get_scale() <= 1:
            raise UserError('the loss is no longer finite: --resume with a smaller --lr or '
                            '--tokenizer-lr, or with --precision float32')

    start, began = state['step'], time.monotonic()
    saved_at = began
    for step, batch in enumerate(stage.batches(start), start):
        # Step: gradients of all processes, clipping, AdamW. Nothing here waits for a GPU.
        lr = stage.lr * learning_rate(step, stage.steps)
        for group in optimizer.param_groups:
            group['lr'] = lr
        if device.type == 'cuda':               # only a copy from pinned memory is asynchronous
            batch = [x.pin_memory() for x in batch]
        batch = [x.to(device, non_blocking=True) for x in batch]
        figures = gradients(stage, step, batch, scaler)
        learning = [p for p in parameters if p.grad is not None]    # not L_G's before it starts
        all_reduce([p.grad for p in learning])
        scaler.unscale_(optimizer)
        figures['gradient norm'] = nn.utils.clip_grad_norm_(learning, 2.0)  # as in the release
        scaler.step(optimizer)
        scaler.update()
        done = step + 1

        # Show. Between evaluations and checkpoints, a single process waits for the GPU only here.
        if step % max(1, min(50, stage.steps // 20)) == 0:
            check_finite()
            all_reduce([figures['loss']])
            seconds = (time.monotonic() - began) / (done - start)   # per step, all included
            figures |= {'learning rate': lr, 'images/s': stage.batch / seconds}
            if rank == 0:
                write_log(config.out / 'log.csv', stage.name, step,
                          {f'train {name}': value for name, value in figures.items()})
                show(f'{stage.name} {step}/{stage.steps}', figures, SHOWN,
                     f'{(stage.steps - done) * seconds / 60:.0f} min left')

        # Evaluate and save. The first process does, and the others wait for it.
        fifth = done * 5 // stage.steps > step * 5 // stage.steps
        if rank == 0 and (fifth or time.monotonic() > saved_at + SAVE_EVERY):
            check_finite()
            if fifth:
                # Compiled blocks would be compiled anew for the shapes of sampling.
                with (autocast(device, config.precision),
                      torch.compiler.set_stance('force_eager')):
                    graded = stage.eval().evaluate()
                stage.train()                   # label dropout and stochastic depth are on again
                write_log(config.out / 'log.csv', stage.name, done, graded)
                show(f'{stage.name} {done}', graded, SHOWN)
            modules = {name: module.state_dict() for name, module in stage.learned.items()}
            state.update(modules, step=done, optimizer=optimizer.state_dict(),
                         scaler=scaler.state_dict())
            write_state(state, config)
            saved_at = time.monotonic()


# ---- The command ----


def write_state(state, config):
    """Writes ckpt.pt, in the first process: state, and the settings of the run."""
    if rank_and_world()[0] == 0:
        kept = {name: value for name, value in vars(config).items() if name not in NOT_SAVED}
        whole = {**state, 'config': kept}
        write_file(config.out / 'ckpt.pt', lambda f: torch.save(whole, f))


def begin(given, path):
    """A new run in path, ckpt.pt: (config, data, vae, var, state). UserError if one is there."""
    config = make_config(given)
    data = read_data(config)
    if 'steps' not in given:                    # each image at most 300 times
        config.steps = min(config.steps, 300 * len(data.train[0]) // config.batch)
    vae, var = new_models(config, given, data.classes)
    if vae.image_size != config.size:
        raise UserError(f'--size {config.size}: with the scales {vae.patch_nums} the tokenizer '
                        f'makes images of {vae.image_size} px')
    if rank_and_world()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Of two runs that begin at once, one is refused. An empty file is of a run that was
            # killed right here.
            path.open('ab' if given.get('resume') else 'xb').close()
        except FileExistsError as e:
            raise UserError(f'{path} is there: --resume goes on with that run; or choose another '
                            '--out, or move it away') from e
    state = dict(classes=data.classes, stage='tokenizer', step=0, optimizer=None,
                 vae=vae.state_dict(), var=var.state_dict())
    write_state(state, config)
    return config, data, vae, var, state


def go_on(given, path):
    """The run in path, ckpt.pt: (config, data, vae, var, state). Data is None in stage 2, which
    reads tokens.npz alone."""
    state, data = read_checkpoint(path), None
    config = resume_config(given, state)
    if state['stage'] == 'tokenizer':
        data = read_data(config)
        if data.classes != state['classes']:
            raise UserError(f'--data {config.data} had other classes when this run began')
    vae, var = build(config, state['classes'])
    load_weights(vae, state['vae'], path)
    load_weights(var, state['var'], path)
    return config, data, vae, var, state


def train_tokenizer(config, data, vae, state):
    """Stage 1, if there is one; then tokens.npz, of all training and GRADED validation images."""
    side, (items, labels) = round(config.zoom * config.size), data.val
    rows = spread(len(items), GRADED)
    sets = {'train': data.train, 'val': ([items[row] for row in rows], labels[rows])}
    if config.tokenizer == 'train':
        gigabytes = 4.5e-9 * len(data.train[0]) * side ** 2     # photographs of 3:2
        tell(f'each process reads all images, into about {gigabytes:.2g} GB of memory')
        sets = {name: read_all(*pair, side) for name, pair in sets.items()}
        agree([len(images) for images, _ in sets.values()], 'number of readable images')
        train_stage(TokenizerStage(config, vae, sets['train'][0], sets['val'][0]), state)
    write_tokens(vae.to(config.device).eval(), sets, config)


def main():
    given = parse(__doc__)
    given['device'] = pick_device(given.get('device'))          # joins the other processes as well
    path = given.get('out', Path()) / 'ckpt.pt'
    goes_on = given.get('resume', False) and path.exists() and path.stat().st_size > 0
    agree(goes_on, 'ckpt.pt')
    if given.get('resume') and not goes_on:
        tell(f'{path} is not there, or empty: a new run begins')
    config, data, vae, var, state = go_on(given, path) if goes_on else begin(given, path)
    if state['stage'] == 'tokenizer':
        train_tokenizer(config, data, vae, state)
        state.update(stage='transformer', step=0, optimizer=None, adversarial=None)
        write_state(state, config)
    wait_for_all()                              # for tokens.npz
    train, val = read_tokens(config.out)
    agree(len(train[0]), 'number of images in tokens.npz')
    compiles = config.compile
    if compiles is None:                        # it takes a minute
        compiles = config.device.type == 'cuda' and config.steps >= 1000 and find_spec('triton')
    if compiles:
        torch._dynamo.config.suppress_errors = True     # without a C compiler, run as they are
        for block in var.blocks:
            block.compile()
    train_stage(TransformerStage(config, vae, var, train, val), state)
    tell(f'done: python sample.py --ckpt {path}')


if __name__ == '__main__':
    run(main)
