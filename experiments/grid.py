"""Pictures of what the models learn: Fig. 7, Fig. 9, and where VAR looks.

    python experiments/scaling.py --data cifar10 && python experiments/grid.py

grid.png, Fig. 7: rows are depths, columns shares of the training, of one seed and class by class.
encoder.png, Fig. 9: the encoder's last self-attention, from four places of a picture: its tokens depend
on each other in all directions, and so no raster order of them has the property that (1) assumes.
attention.png: which earlier scales a token of each scale looks at, a mean over a validation set's pictures.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use('Agg')
import matplotlib.pyplot as plt                                             # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import var as var_module                                                    # noqa: E402
from judge import everything                                                # noqa: E402
from sample import Problem, load_models, parse, run, save_grid, to_uint8     # noqa: E402
from train import Options as Settings, read_data                            # noqa: E402


@dataclass
class Options:
    """The options of the command line, as --name value."""
    runs: Path = Path('scaling')        # what scaling.py left
    ckpt: Path = Path('ckpt.pt')        # the models whose attention is shown
    data: str = 'cifar10'               # as for train.py
    n: int = 64                         # validation pictures for the attention of the transformer
    out: Path = Path('.')               # folder of the three pictures


def draw_grid(runs, path):
    """Fig. 7: a row a depth; four classes side by side, each after growing shares of the training."""
    depths = sorted(runs.glob('d*'), key=lambda f: int(f.name[1:]))
    if not depths:
        raise Problem(f'{runs}: nothing of scaling.py is there')
    rows = []
    for folder in depths:
        stages = sorted(folder.glob('*.npy'), key=lambda f: int(f.stem))
        drawn = np.stack([np.load(f) for f in stages], axis=1)[:4]          # (classes, stages, H, W, 3)
        rows.append(drawn.reshape(-1, *drawn.shape[2:]))
    save_grid(path, rows)
    print(f'{path}: rows are depths', *(f.name[1:] for f in depths), '; columns, class by class:',
          *(f'{f.stem} %' for f in stages))


def encoder_attention(vae, image):
    """The last self-attention of the encoder, (P * P, P * P): rows look, columns are looked at."""
    block, seen = vae.encoder.mid.attn_1, []
    handle = block.norm.register_forward_hook(lambda module, inputs, x: seen.append(x))
    vae.latent(image)
    handle.remove()
    q, k, _ = block.qkv(seen[0]).flatten(2).chunk(3, dim=1)                 # (1, C, P * P) each
    return (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)[0]


def scale_attention(vae, var, images, labels):
    """How much a token of scale i looks at each token set of scale j: (depth, K, K), rows sum to 1."""
    lengths, shares = [p * p for p in var.patch_nums], []
    usual = var_module.attend

    def attend(q, k, v):
        weights = (q.float() @ k.float().transpose(2, 3)).softmax(-1)       # (B, h, l, m)
        ends = np.cumsum(lengths)
        parts = weights.split(lengths[:(ends <= k.shape[2]).sum()], dim=3)  # of the scales up to its own
        row = torch.stack([part.sum(3).mean() for part in parts])
        shares.append(torch.nn.functional.pad(row, (0, len(lengths) - len(row))))
        return usual(q, k, v)

    var_module.attend = attend
    try:
        var(labels, vae.var_input(vae.encode(images)))
    finally:
        var_module.attend = usual
    return torch.stack(shares).view(-1, len(lengths), len(lengths)).flip(1)     # the last scale looks first


@torch.no_grad()
def main():
    given = Options(**parse(Options, __doc__))
    given.out.mkdir(parents=True, exist_ok=True)
    draw_grid(given.runs, given.out / 'grid.png')
    vae, var, _ = load_models(given.ckpt)
    if var is None:
        raise Problem(f'{given.ckpt} has a tokenizer only')
    _, val, _ = read_data(Settings(data=given.data, size=vae.image_size))
    images, labels = everything(val, given.n)

    P, figure = vae.patch_nums[-1], plt.figure(figsize=(9, 5.5), constrained_layout=True)
    axes = figure.subplots(3, 5)
    for row, i in zip(axes, (0, given.n // 3, 2 * given.n // 3)):
        weights = encoder_attention(vae, images[i:i + 1])
        row[0].imshow(to_uint8(images[i:i + 1] / 2 + 0.5)[0])
        for axis, (y, x) in zip(row[1:], [(P // 4, P // 4), (P // 4, 3 * P // 4), (P // 2, P // 2), (3 * P // 4, P // 4)]):
            axis.imshow(weights[y * P + x].view(P, P))
            axis.plot(x, y, 'r+', ms=12)
        for axis in row:
            axis.axis('off')
    figure.suptitle("The encoder's last self-attention: where each marked place (+) looks")
    figure.savefig(given.out / 'encoder.png', dpi=70)

    shares = scale_attention(vae, var, images, labels)                      # (depth, K, K)
    names, K = [f'{p}x{p}' for p in var.patch_nums], len(var.patch_nums)
    figure, axes = plt.subplots(1, 1 + len(shares), figsize=(3.2 * (1 + len(shares)), 3.4), constrained_layout=True)
    for axis, share, title in zip(axes, [shares.mean(0), *shares], ['all blocks', *(f'block {i}' for i in range(1, 99))]):
        axis.imshow(share, vmin=0, vmax=1, cmap='Blues')
        for i in range(K):
            for j in range(i + 1):
                axis.text(j, i, f'{100 * share[i, j]:.0f}', ha='center', va='center', fontsize=7,
                          color='white' if share[i, j] > 0.5 else 'black')
        axis.set(title=title, xticks=range(K), yticks=range(K))
        axis.set_xticklabels(names, fontsize=7)
        axis.set_yticklabels(names, fontsize=7)
    axes[0].set(ylabel='a token of this scale', xlabel='looks at this scale, %')
    figure.savefig(given.out / 'attention.png', dpi=70)
    for name, share in zip(names, shares.mean(0)):
        print(f'{name:>6} looks at', ', '.join(f'{n} {s:.0%}' for n, s in zip(names, share) if s))


if __name__ == '__main__':
    run(main)
