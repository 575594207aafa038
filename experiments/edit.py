"""Zero-shot editing (Section 6, Fig. 8): in-painting, out-painting, class-conditional editing.

    python experiments/edit.py photo.jpg --box .25 .25 .75 .75              # in-painting
    python experiments/edit.py photo.jpg --box .25 .25 .75 .75 --cls 3      # as class 3
    python experiments/edit.py photo.jpg --box 0 0 1 .5 --outside           # out-painting

The inside of the boxes, fractions of the square in the middle of the photograph, is generated; the
rest is kept. Without --cls the label is "no class", as in the paper's in- and out-painting, and
--cfg has no effect. The sheet shows in each row the photograph, the part that is kept, and the
results. The tokens that are kept are those of the whole photograph, so that the kept part shows the
tokenizer's own errors.

Letters: N images in all, H x W pixels, P side of the last token map, K scales, l tokens of one.
"""
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support                                  # before torch: see there
import numpy as np
import torch
import torch.nn.functional as F

from sample import draw_all
from support.checkpoints import load
from support.images import crop, fit, make_grid, open_image, save_image, to_tensor
from support.options import chosen_labels, make_parser, new_file, number
from support.run import UserError, pick_device, run, tell


def kept_tokens(keep, p):
    """Which tokens of a p x p map the mask (P, P) keeps: bool (l,). Source: the release.

    The mask is shrunk bilinearly: of a cell, however large, only the four mask values nearest its
    middle count, and the cell is kept if their weighted mean is above one half. The 1x1 map is
    always kept: its token stands for the whole image. Other kept tokens, too, depend on the removed
    part, through the encoder's attention and the scales before: if it is made grey before drawn
    shapes are encoded, 97 to 100 % of them change (reasons.py). What they tell of it is unknown.
    """
    if p == 1:
        return torch.ones(1, dtype=torch.bool, device=keep.device)
    small = F.interpolate(keep[None, None].float(), size=(p, p), mode='bilinear')
    return small.flatten() > 0.5


def new_positions(P, boxes, outside=False):
    """Which latent positions are to be generated: bool (P, P). A box covers rows round(y0 P) to
    round(y1 P), columns likewise (as in the release). outside: all others. UserError where nothing
    is left to keep or to generate."""
    new = np.zeros((P, P), dtype=bool)
    for y0, x0, y1, x1 in boxes:
        new[round(y0 * P):round(y1 * P), round(x0 * P):round(x1 * P)] = True
    if new.all() or not new.any():
        raise UserError(f'--box must cover 1 to {P * P - 1} of the {P} x {P} positions')
    return ~new if outside else new


def main():
    parser = make_parser(__doc__, '--ckpt', '--tokenizer', '--cls', '--n', '--cfg', '--seed',
                         '--precision', '--device')
    add = parser.add_argument
    add('photo', type=Path, help='the photograph')
    add('--box', type=number(float, 0, 1), nargs=4, action='append', required=True,
        metavar=('Y0', 'X0', 'Y1', 'X1'), help='to be generated; may be given several times')
    add('--outside', action='store_true', help='generate everything else instead')
    add('--out', type=new_file('.png'), default='edited.png', help='the sheet, a row per class')
    args = parser.parse_args()
    if args.out.exists() and args.out.samefile(args.photo):
        raise UserError(f'--out {args.out} would overwrite the photograph: choose another')
    device = pick_device(args.device)
    vae, var, ckpt = load(args.ckpt, args.tokenizer, device)
    config, size = ckpt['config'], vae.image_size
    labels = chosen_labels(args, ckpt, [var.num_classes])                   # (N,), "no class"
    options = dict(config['sampling'])
    if not args.cls:
        options['cfg'] = 0.                     # "no class" is not guided by itself
    elif args.cfg is not None:
        options['cfg'] = args.cfg
    photo = crop(fit(open_image(args.photo, size), size), size)             # (H, W, 3)
    new = new_positions(vae.patch_nums[-1], args.box, args.outside)         # (P, P)
    keep = torch.from_numpy(~new).to(device)                                # (P, P)
    masks = [kept_tokens(keep, p) for p in vae.patch_nums]                  # K of (l,)
    given = vae.encode(to_tensor(photo[None]).to(device))       # K maps (1, l), for every image
    generate = partial(var.generate, vae, given=given, keep=masks, **options)
    frames = draw_all(vae, generate, labels, args.seed, args.precision or config['precision'])
    pixels = np.kron(new, np.ones((size // len(new),) * 2, bool))           # (H, W)
    kept = np.where(pixels[..., None], np.uint8(128), photo)                # (H, W, 3)
    rows = [np.stack([photo, kept, *row]) for row in frames[:, -1].reshape(-1, args.n, *kept.shape)]
    save_image(args.out, make_grid(rows))
    tell(f'drew {len(frames)} images; wrote {args.out}')


if __name__ == '__main__':
    run(main)
