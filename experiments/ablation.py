"""Table 3 at a size that anyone can run: what each of VAR's choices is worth.

    python experiments/ablation.py                          # the built-in shapes
    python experiments/ablation.py --data cifar10 --out ablation-cifar10

Rows add up, as in the paper: raster-scan AR, VAR with plain LayerNorm, AdaLN, top-k, guidance, normalised
queries and keys, a deeper model. All are trained on the same pictures with the same number of steps;
each goes on after an interruption. Cost is the time of drawing a batch, of the raster-scan AR's. The judge is
a small classifier that learns the data first (judge.py). Writes the table, ablation.md, and a sheet of samples, a row a row.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train                                                                # noqa: E402
from judge import draw_each, make_judge                                     # noqa: E402
from raster import Raster                                                   # noqa: E402
from sample import parse, pick_device, precision, read_weights, run, save_grid, to_uint8    # noqa: E402
from var import VAR                                                         # noqa: E402


class PlainNorm(VAR):
    """LayerNorm with gains, shifts and gates that are learned, but know nothing of the class: only the
    start token tells it. (What the class would have chosen is AdaLN's bias; its matrices have no part.)"""
    def modulations(self, condition):
        blocks, head = super().modulations(torch.zeros_like(condition))
        return [(1 + gamma1, 1 + gamma2, *rest) for gamma1, gamma2, *rest in blocks], head


@dataclass
class Options:
    """The options of the command line, as --name value."""
    data: str = 'shapes'                # as for train.py
    depth: int = 3                      # of all rows but the last
    deeper: int = 5                     # of the last
    steps: int = 1000                   # of each transformer
    tokenizer_steps: int = 900          # of both tokenizers, with several scales and with one
    top_k: int = 40
    cfg: float = 4.                     # guidance of the last scale
    n: int = 50                         # samples a class
    judge_steps: int = 400
    out: Path = Path('ablation')        # folder of all that this makes
    device: str = None                  # cuda, mps or cpu; the best there is if not given


def stage_of(make, args, folder, **more):
    """Trains the stage that make() returns, or goes on with it, or finds it trained in folder / ckpt.pt.

    What was made there with other settings is made anew. more: what else ckpt.pt is to hold."""
    args.out = folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'ckpt.pt'
    key = repr(sorted((k, v) for k, v in vars(args).items() if k not in train.MACHINE))
    state = dict(read_weights(path)) if path.exists() else {}
    if state.get('settings') != key:
        state = dict(step=0, optimizer=None, settings=key, **more)
        for old in (folder / 'log.csv', *folder.glob('*.npy')):
            old.unlink(missing_ok=True)
    torch.manual_seed(args.seed)
    stage = make()
    if state['step'] < stage.steps:
        train.train_stage(stage, args, state)
    else:
        for name in {'vae', 'var'} & {*state}:
            getattr(stage, name).load_state_dict(state[name])
    return stage.eval().requires_grad_(False)


def main():
    given = Options(**parse(Options, __doc__))
    device = pick_device(given.device)
    preset = train.PRESETS['shapes'] if given.data == 'shapes' else train.SMALL
    args = train.Options(**preset | dict(data=given.data, steps=given.steps, tokenizer_steps=given.tokenizer_steps))
    args.device, args.workers = device, 0
    *data, classes = train.read_data(args)
    judge, real = make_judge(*data, classes, given.judge_steps)

    tokenizers, sets, sides = {}, {}, [int(p) for p in args.patch_nums.split(',')]
    for kind, scales in ('raster', sides[-1:]), ('scales', sides):
        args.sides = scales
        vae = stage_of(lambda: train.TokenizerStage(args, train.make_vae(args, {}).to(device), *data).to(device),
                       args, given.out / kind).vae
        with precision(device):
            sets[kind] = [train.tokenize(vae, x, args, name) for x, name in zip(data, ('train', 'val'))]
        tokenizers[kind] = Raster(vae) if kind == 'raster' else vae

    # Each row: its name, the run it draws from, kind of tokens, class, depth, options, sampling.
    plain = dict(top_k=0, top_p=1., cfg=0.)
    k = plain | dict(top_k=given.top_k)
    both = k | dict(cfg=given.cfg)
    rows = [('raster-scan AR', 'ar', 'raster', PlainNorm, given.depth, False, plain),
            ('VAR, plain LayerNorm', 'plain', 'scales', PlainNorm, given.depth, False, plain),
            ('+ AdaLN', 'adaln', 'scales', VAR, given.depth, False, plain),
            (f'+ top-k {given.top_k}', 'adaln', 'scales', VAR, given.depth, False, k),
            (f'+ guidance {given.cfg:g}', 'adaln', 'scales', VAR, given.depth, False, both),
            ('+ normalised q, k', 'norm', 'scales', VAR, given.depth, True, both),
            (f'+ deeper (d {given.deeper})', 'deeper', 'scales', VAR, given.deeper, True, both)]
    lines, sheet, unit, done = ['| | parameters | cost | Frechet distance | told right | val loss |', '|---|---|---|---|---|---|'], [], None, {}
    for name, run_name, kind, model, depth, qk_norm, sampling in rows:
        vae = tokenizers[kind]
        if run_name not in done:
            args.depth, args.sampling = depth, sampling
            scales = vae.sides if kind == 'raster' else sides

            def make():
                V, z = vae.quantize.embedding.weight.shape
                var = model(scales, depth, len(classes), V, z, qk_norm=qk_norm).to(device)
                return train.TransformerStage(args, vae, var, *sets[kind])

            var = stage_of(make, args, given.out / run_name).var
            tokens, labels = sets[kind][1]
            with precision(device):
                done[run_name] = var, train.grade_transformer(vae, var, tokens, labels, device)['loss']
        var, loss = done[run_name]
        began = time.time()
        drawn = draw_each(vae, var, given.n, device, sampling)
        seconds = time.time() - began
        unit = unit or seconds
        right, distance = judge.grade(drawn, real)
        unused = sum(p.numel() for n, p in var.named_parameters() if 'ada_lin' in n and p.ndim > 1 and model is PlainNorm)
        N = (sum(p.numel() for p in var.parameters()) - unused) / 1e6
        lines.append(f'| {name} | {N:.1f} M | {seconds / unit:.3f} | {distance:.2f} | '
                     f'{right.mean():.1%} | {loss if kind == "scales" else float("nan"):.3f} |')
        print(lines[-1], flush=True)
        sheet.append(to_uint8(drawn[:, 0] / 2 + 0.5))
        save_grid(given.out / 'ablation.png', sheet)
        (given.out / 'ablation.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    run(main)
