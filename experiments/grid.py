"""Figures of what the models learn: Fig. 7, Fig. 9, and the attention over scales.

    python experiments/scaling.py      # leaves the samples of Fig. 7
    python experiments/grid.py

Writes three images into --out:
- grid.png, Fig. 7: a row per depth. The columns are four classes, each after growing shares of the
  training, all from one seed.
- encoder.png, Fig. 9: the last self-attention of the encoder, from four positions of three images.
  Its tokens depend on each other in all directions, so that no raster order of them has the
  property that equation (1) assumes.
- attention.png, beyond the paper: how much the tokens of each scale attend to each scale, averaged
  over heads and validation images.

Letters: B images, C channels, P side of the latent, K scales, L tokens of all scales, d depth,
h heads.
"""
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

matplotlib.use('Agg')
import matplotlib.pyplot as plt                                             # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import var as var_module                                                    # noqa: E402
from runs import data_config, read_same_data                                # noqa: E402
from sample import load_both                                                # noqa: E402
from tokenizer import UserError, make_grid, save_image, to_tensor           # noqa: E402
from var import Parser, number, pick_device, run, scale_of_token            # noqa: E402


def draw_grid(runs, path):
    """Fig. 7, from the samples-<per cent>.npy of scaling.py: uint8 (classes, H, W, 3) each."""
    folders = sorted(runs.glob('d*'), key=lambda folder: int(folder.name[1:]))
    rows = []
    for folder in folders:
        percents = sorted(int(file.stem.removeprefix('samples-'))
                          for file in folder.glob('samples-*.npy'))
        samples = [np.load(folder / f'samples-{percent}.npy') for percent in percents]
        if samples:
            four = np.stack(samples, axis=1)[:4]        # (4 classes, percents, H, W, 3)
            rows.append(four.reshape(-1, *four.shape[2:]))
            print(f'{path}: row {len(rows)} has depth {folder.name[1:]}, and for each class the '
                  'samples at', *percents, '% of the training')
    if not rows:
        raise UserError(f'{runs}: no samples of scaling.py in it')
    save_image(path, [make_grid(rows)])


def encoder_attention(vae, image):
    """The last self-attention of the encoder for one image (1, 3, H, W): the weights
    (P * P, P * P). A row belongs to the position that attends."""
    block = vae.encoder.mid.attn_1
    inputs = []
    handle = block.norm.register_forward_hook(lambda module, args, x: inputs.append(x))
    vae.to_latent(image)
    handle.remove()
    qkv = block.qkv(inputs[0])                                              # (1, 3C, P, P)
    q, k, _ = qkv.flatten(2).chunk(3, dim=1)                                # (1, C, P * P) each
    scores = q.transpose(1, 2) @ k * q.shape[1] ** -0.5                     # (1, P * P, P * P)
    return scores.softmax(-1)[0]


def scale_attention(vae, var, images, labels):
    """How much the tokens of each scale attend to each scale: (d, K, K), rows add up to 1.

    images (B, 3, H, W), labels (B,). Each block computes its weights in one pass over all scales
    under the block-causal mask; here they are recomputed next to it.
    """
    K = len(var.patch_nums)
    in_scale = F.one_hot(scale_of_token(var.patch_nums), K).float().to(images.device)       # (L, K)
    tokens_of_scale = in_scale.sum(0)[:, None]                              # (K, 1)
    shares = []
    usual_attend = var_module.attend

    def attend(q, k, v, mask):
        scores = q.float() @ k.float().transpose(2, 3) + mask               # (B, h, L, L)
        weights = scores.softmax(-1).mean((0, 1))                           # (L, L)
        shares.append(in_scale.T @ weights @ in_scale / tokens_of_scale)    # (K, K)
        return usual_attend(q, k, v, mask)

    var_module.attend = attend
    try:
        var(labels, vae.var_input(vae.encode(images)))
    finally:
        var_module.attend = usual_attend
    return torch.stack(shares)


def draw_encoder_attention(vae, images, path):
    """Fig. 9, for three images uint8 (3, H, W, 3): a row per image, with four positions that
    attend, marked by crosses."""
    device, P = vae.quantize.embedding.weight.device, vae.patch_nums[-1]
    near, middle, far = P // 4, P // 2, 3 * P // 4
    positions = [(near, near), (near, far), (middle, middle), (far, near)]
    figure, axes = plt.subplots(3, 5, figsize=(9, 5.5), constrained_layout=True)
    for row, image in zip(axes, images):
        weights = encoder_attention(vae, to_tensor(image[None].to(device))).cpu()
        row[0].imshow(image.numpy())
        for axis, (y, x) in zip(row[1:], positions):
            axis.imshow(weights[y * P + x].view(P, P).numpy())
            axis.plot(x, y, 'r+', ms=12)
        for axis in row:
            axis.axis('off')
    figure.suptitle("The encoder's last self-attention: what each marked position (+) attends to")
    figure.savefig(path, dpi=70)


def draw_scale_attention(shares, patch_nums, path):
    """A matrix in per cent for the mean of all blocks, and one for each block: shares (d, K, K)."""
    names, K, d = [f'{p}x{p}' for p in patch_nums], len(patch_nums), len(shares)
    matrices = {'all blocks': shares.mean(0)}
    for i, share in enumerate(shares, start=1):
        matrices[f'block {i}'] = share
    figure, axes = plt.subplots(1, 1 + d, figsize=(3.2 * (1 + d), 3.4), constrained_layout=True)
    for axis, (title, matrix) in zip(axes, matrices.items()):
        axis.imshow(matrix.numpy(), vmin=0, vmax=1, cmap='Blues')
        for i in range(K):
            for j in range(i + 1):
                colour = 'white' if matrix[i, j] > 0.5 else 'black'
                axis.text(j, i, f'{100 * matrix[i, j]:.0f}', ha='center', va='center', fontsize=7,
                          color=colour)
        axis.set(title=title, xticks=range(K), yticks=range(K))
        axis.set_xticklabels(names, fontsize=7)
        axis.set_yticklabels(names, fontsize=7)
    axes[0].set(ylabel='tokens of this scale', xlabel='attend to this scale, %')
    figure.savefig(path, dpi=70, bbox_inches='tight')       # or the titles are cut off


def parse():
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--runs', type=Path, default=Path('scaling'), help='the --out of scaling.py')
    add('--ckpt', type=Path, default=Path('ckpt.pt'), help='the models whose attention is shown')
    add('--data', help='as for train.py; default: what --ckpt was trained on')
    add('--n', type=number(int, 3), default=64, help='validation images (default: 64)')
    add('--out', type=Path, default=Path('.'), help='folder of the three images')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse()
    device = pick_device(args.device)
    draw_grid(args.runs, args.out / 'grid.png')
    vae, var, ckpt = load_both(args.ckpt)
    vae, var = vae.to(device), var.to(device)
    config = data_config(ckpt, vae.image_size, args.data)
    _, val, _ = read_same_data(config, ckpt, var.num_classes)
    images, labels = val.some(args.n)                                       # (n, H, W, 3), (n,)

    n = len(images)
    draw_encoder_attention(vae, images[[0, n // 3, 2 * n // 3]], args.out / 'encoder.png')

    shares = 0
    for x, label in zip(images.split(16), labels.split(16)):    # (L, L) weights need much memory
        share = scale_attention(vae, var, to_tensor(x.to(device)), label.to(device))
        shares = shares + share.cpu() * len(x) / n                          # (d, K, K)
    draw_scale_attention(shares, vae.patch_nums, args.out / 'attention.png')
    names = [f'{p}x{p}' for p in vae.patch_nums]
    for i, row in enumerate(shares.mean(0).tolist()):
        parts = [f'{name} {share:.0%}' for name, share in zip(names[:i + 1], row)]
        print(f'{names[i]:>6} attends to', ', '.join(parts))


if __name__ == '__main__':
    run(main)
