"""Stage 2 (Section 4): what each choice in the transformer's training gains, in the same minutes.

    python experiments/levers.py                            # fifteen runs of seven minutes
    python experiments/levers.py --only defaults 'batch 64'
    python experiments/levers.py --cfg 3                    # the same runs, with other guidance

All runs have the tokenizer, the tokens and the options of --ckpt, but for one option or a change
of the stage. Each makes as many steps as it would make in --minutes: the seconds per step of all
runs are measured first, in turn, so that whatever else happens on the machine slows all alike.
A run has a folder of its own and continues where it was interrupted. Frechet distance and the
share that is classified correctly come from the classifier of judge.py, which is trained on
blurred images as well; a larger one can order the runs otherwise. Three seeds of the defaults tell
which differences mean nothing. Guidance acts more strongly in a better model: compare the distances
with more than one --cfg.
Writes levers.md, and pace-<device>-<tokenizer>.json, the seconds per step.

Letters: B images per batch, L tokens of all scales, l of one, K scales, C classes, V codes.
"""
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
from judge import draw_classes, train_classifier                            # noqa: E402
from runs import open_run, read_same_data, train_or_load, validation_loss   # noqa: E402
from tokenizer import write_file                                            # noqa: E402
from train import (TransformerStage, make_config, make_optimizers,          # noqa: E402
                   make_scaler, make_var, tokenize, tokens_key, train_step)
from var import Parser, number, pick_device, run                            # noqa: E402


# ---- The levers: an option, or a function that changes a TransformerStage before training ----


def average(stage):
    """Samples come from an EMA of the weights over about the last hundred steps."""
    stage.average = AveragedModel(stage.var, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    stage.average.requires_grad_(False)
    stage.sampled = stage.average.module
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
    'AdamW 1e-3 beside Muon': {'config': {'lr': 1e-3}},
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
    given = dict(device=device, epochs=0., out=args.out / name.replace(' ', '-'))
    if args.data:
        given['data'] = args.data
    return make_config({**given, **LEVERS[name].get('config', {})}, saved)


def make_stage(name, config, vae, tokens, num_classes):
    """A new transformer and its training. tokens: of the training and of the validation set."""
    var = make_var(config, vae, num_classes).to(config.device)
    stage = TransformerStage(config, vae, var, *tokens)
    stage.sampled = var                                 # the weights that are graded, at the end
    stage.evaluate = lambda: {}                         # no figures on the way: they take time
    if 'change' in LEVERS[name]:
        LEVERS[name]['change'](stage)
    return stage


def measure_pace(stages, rounds=5):
    """Seconds per step of each stage, {name: stage}: medians over rounds of two steps of each.

    The first round, which allocates memory, does not count. The stages are trained by it.
    """
    work, times = {}, {name: [] for name in stages}
    for name, stage in stages.items():
        stage.train()
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
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--ckpt', type=Path, default=Path('ckpt.pt'), help='its tokenizer and its options are used')
    add('--data', help='as for train.py; default: what --ckpt was trained on')
    add('--minutes', type=number(float, 0, 1e4), default=7., help='of each run (default: 7)')
    add('--only', nargs='+', choices=LEVERS, default=list(LEVERS), help='these runs')
    add('--n', type=number(int, 1), default=200, help='samples per class (default: 200)')
    add('--cfg', type=number(float, 0), help='guidance of the samples; default: that of --ckpt')
    add('--judge-steps', type=number(int, 1), default=1200,
        help='of the classifier (default: 1200)')
    add('--out', type=Path, default=Path('levers'), help='folder for everything (default: levers)')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    return parser.parse_args()


def main():
    args = parse()
    device = pick_device(args.device)
    vae, saved, shared = open_run(args.ckpt, device)
    configs = {name: config_of(name, args, device, saved) for name in args.only}
    first = configs[args.only[0]]
    num_classes = len(shared['classes'])
    train, val, classes = read_same_data(first, shared, num_classes)
    # It sees mirrored images, too, as one of the runs is trained with them.
    classifier, real = train_classifier(train, val, classes, args.judge_steps, device, mirror=True)

    stored = {}                                         # by the number of views per image
    for config in configs.values():
        views = config.views
        if views not in stored:
            elsewhere = replace(config, out=args.out / f'views-{views}')
            stored[views] = (tokenize(vae, train, elsewhere, 'train', views),
                             tokenize(vae, val, elsewhere, 'val'))

    def stage_of(name):
        config = configs[name]
        return make_stage(name, config, vae, stored[config.views], num_classes)

    inputs = tokens_key(vae, train, 1, first)
    path = args.out / f'pace-{device.type}-{inputs:08x}.json'
    pace = json.loads(path.read_text()) if path.exists() else {}
    pace.update(measure_pace({name: stage_of(name) for name in configs if name not in pace}))
    write_file(path, lambda f: f.write(json.dumps(pace, indent=1).encode()))

    sampling = shared['sampling']
    if args.cfg is not None:
        sampling = {**sampling, 'cfg': args.cfg}
    lines = ['| | steps | images seen | loss | Frechet distance | classified correctly |',
             '|---|---|---|---|---|---|']
    for name, config in configs.items():
        config.steps = max(1, round(60 * args.minutes / pace[name]))
        stage = train_or_load(partial(stage_of, name), config, inputs,
                              stage='transformer', **shared)
        loss = validation_loss(stage, stage.sampled)
        samples = draw_classes(vae, stage.sampled, args.n, device, sampling)
        share, distance = classifier.grade(samples, real)   # samples: (C, n, H, W, 3)
        lines.append(f'| {name} | {config.steps} | {config.steps * config.batch} | {loss:.3f} | '
                     f'{distance:.1f} | {share.mean():.1%} |')
        print(lines[-1], flush=True)
        (args.out / 'levers.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    run(main)
