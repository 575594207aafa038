"""Stage 2 (Section 4): what each choice in the transformer's training gains, in the same minutes.

    python experiments/levers.py --data cifar10             # fifteen runs of seven minutes
    python experiments/levers.py --data cifar10 --only defaults 'batch 64'

All runs have the tokenizer, the tokens and the options of --ckpt, but for one option or a change
of the stage. Each makes as many steps as it would make in --minutes: the seconds per step of all
runs are measured first, in turn, so that whatever else happens on the machine slows all alike.
A run has a folder of its own and continues where it was interrupted. Frechet distance and the
share that is classified correctly come from the classifier of judge.py; three seeds of the
defaults tell which differences mean nothing.
Writes levers.md, and pace.json, the seconds per step.

Letters: B images per batch, L tokens of all scales, l of one, K scales, C classes, V codes.
"""
import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ablation import train_or_load                                          # noqa: E402
from judge import draw_classes, train_classifier                            # noqa: E402
from tokenizer import UserError, write_file                                 # noqa: E402
from train import (TransformerStage, grade_transformer, make_config,        # noqa: E402
                   make_optimizers, make_scaler, make_var, read_data, readable, tokenize,
                   train_step)
from var import Parser, load, number, pick_device, precision, run           # noqa: E402


# ---- The levers: an option, or a function that changes a TransformerStage before training ----


def average(stage):
    """Samples come from an EMA of the weights, with decay 0.999, and not from the last ones."""
    stage.average = AveragedModel(stage.var, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    stage.average.requires_grad_(False)
    stage.learned = lambda: {'var': stage.var, 'average': stage.average}
    stage.after_step = lambda: stage.average.update_parameters(stage.var)


def label_dropout(rate, stage):
    """With rate 0 "no class" is never trained, and guidance has nothing to guide away from."""
    stage.var.label_dropout = rate


def equal_scales(stage):
    """Every scale counts the same in the loss, however many tokens it has."""
    sides = stage.var.patch_nums
    weights = torch.cat([torch.full((p * p,), 1 / (len(sides) * p * p)) for p in sides])    # (L,)

    def forward(tokens, labels):
        maps = tokens.split([p * p for p in sides], dim=1)                  # K of (B, l)
        logits, _ = stage.var(labels, stage.vae.var_input(maps))            # (B, L, V)
        each = F.cross_entropy(logits.transpose(1, 2), tokens, reduction='none')    # (B, L)
        return each.mean(0) @ weights.to(each.device), {}

    stage.forward = forward


LEVERS = {
    'defaults': {},
    'seed 1': {'config': {'seed': 1}},
    'seed 2': {'config': {'seed': 2}},
    'AdamW for all': {'config': {'muon_lr': 0.}},
    'Muon 0.01': {'config': {'muon_lr': 0.01}},
    'AdamW 1e-3': {'config': {'lr': 1e-3}},
    'batch 16': {'config': {'batch': 16, 'micro_batch': 16}},
    'batch 64': {'config': {'batch': 64, 'micro_batch': 64}},
    'depth 3': {'config': {'depth': 3}},
    'depth 5': {'config': {'depth': 5}},
    'flips': {'config': {'flip': True}},
    'averaged weights': {'change': average},
    'label dropout 0': {'change': partial(label_dropout, 0.)},
    'label dropout 0.05': {'change': partial(label_dropout, 0.05)},
    'scales count the same': {'change': equal_scales}}


def config_of(name, args, device, saved):
    """The Config of a run: that of the checkpoint (saved), but for the lever."""
    given = dict(data=args.data, device=device, epochs=0., out=args.out / name.replace(' ', '-'))
    return make_config({**given, **LEVERS[name].get('config', {})}, saved)


def make_stage(name, config, vae, tokens, num_classes):
    """A new transformer and its training. tokens: of the training and of the validation set."""
    var = make_var(config, vae, num_classes, resumed=True).to(config.device)
    stage = TransformerStage(config, vae, var, *tokens)
    if 'change' in LEVERS[name]:
        LEVERS[name]['change'](stage)
    return stage


def measure_pace(stages, rounds=5):
    """Seconds per step of each stage, {name: stage}: medians over rounds of two steps of each.

    The first round, which allocates memory, does not count. The stages are trained by it.
    """
    work, times = {}, {name: [] for name in stages}
    for name, stage in stages.items():
        stage.train().step = stage.steps // 2
        work[name] = make_optimizers(stage), make_scaler(stage.config), next(stage.batches(0))
    for _ in range(1 + rounds):
        for name, stage in stages.items():
            began = time.perf_counter()
            for _ in range(2):
                loss = train_step(stage, *work[name])['loss']
            loss.item()                                         # waits for the device
            times[name].append((time.perf_counter() - began) / 2)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def parse():
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--ckpt', type=Path, default=Path('ckpt.pt'), help='its tokenizer and its options are used')
    add('--data', default='cifar10', help='as for train.py')
    add('--minutes', type=number(float, 0, 1e4), default=7., help='of each run (default: 7)')
    add('--only', nargs='+', choices=LEVERS, default=list(LEVERS), help='these runs')
    add('--n', type=number(int, 1), default=200, help='samples per class (default: 200)')
    add('--judge-steps', type=number(int, 1), default=1200,
        help='of the classifier (default: 1200)')
    add('--out', type=Path, default=Path('levers'), help='folder for everything (default: levers)')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    return parser.parse_args()


def main():
    args = parse()
    device = pick_device(args.device)
    vae, _, ckpt = load(args.ckpt)
    if 'config' not in ckpt:
        raise UserError(f'{args.ckpt} was not made by train.py')
    vae = vae.to(device).requires_grad_(False)
    configs = {name: config_of(name, args, device, ckpt['config']) for name in args.only}
    train, val, classes, _ = read_data(configs[args.only[0]])
    if classes != ckpt['classes']:
        raise UserError(f'--data {args.data} has other classes than {args.ckpt}')
    classifier, real = train_classifier(train, val, classes, args.judge_steps, device)

    stored = {}                                         # by the number of views per image
    for config in configs.values():
        views = config.views
        if views not in stored:
            folder = replace(config, out=args.out / f'views-{views}')
            stored[views] = (tokenize(vae, train, folder, 'train', views),
                             tokenize(vae, val, folder, 'val'))

    def stage_of(name):
        config = configs[name]
        return make_stage(name, config, vae, stored[config.views], len(classes))

    path = args.out / 'pace.json'
    pace = json.loads(path.read_text()) if path.exists() else {}
    pace.update(measure_pace({name: stage_of(name) for name in configs if name not in pace}))
    write_file(path, lambda f: f.write(json.dumps(pace, indent=1).encode()))

    # With these, sample.py can sample from the ckpt.pt of a run.
    shared = {name: ckpt[name] for name in ('classes', 'words', 'patch_nums', 'sampling', 'vae')}
    lines = ['| | steps | images seen | loss | Frechet distance | classified correctly |',
             '|---|---|---|---|---|---|']
    for name, config in configs.items():
        config.steps = max(1, round(60 * args.minutes / pace[name]))
        stage = train_or_load(partial(stage_of, name), config, stage='transformer', **shared)
        var = stage.average.module if name == 'averaged weights' else stage.var
        tokens, labels = stage.fetch_rows(stage.val_set, readable(stage.val_set[0]))
        with precision(device):
            loss = grade_transformer(vae, var, tokens, labels, device)['loss']
        samples = draw_classes(vae, var, args.n, device, ckpt['sampling'])  # (C, n, H, W, 3)
        share, distance = classifier.grade(samples, real)
        lines.append(f'| {name} | {config.steps} | {config.steps * config.batch} | {loss:.3f} | '
                     f'{distance:.1f} | {share.mean():.1%} |')
        print(lines[-1], flush=True)
        (args.out / 'levers.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    run(main)
