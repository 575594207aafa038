"""Speed of this code on this machine: training, sampling, and VAR against raster-scan AR.

    python experiments/bench.py                                     # for a CPU
    python experiments/bench.py --depths 16 --batch 32 --draw 1 16 64 --compile     # a large GPU

Paper: Table 1 (time of sampling), and the appendix on time complexity: attention of n^2 tokens has
O(n^4) pairs, as the last scale of VAR has once. Raster-scan AR without cached keys and values has
n^2 such passes, O(n^6). Training (a forward and a backward pass on given tokens, without the
optimizer) and sampling (guided, which doubles the batch) have the official sizes at 256 px, and
random weights. All times are medians. The peak matmul throughput is measured first and last: a
shared machine changes its speed. Writes bench.png, the comparison with raster-scan AR, at depth 6.

Letters: B images per batch, n side of the last token map, d depth, z code dimension, l tokens of
one scale, L tokens of all.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import support                                  # before torch: see there
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from raster import Raster
from support.options import at_least_1, make_parser
from support.run import autocast, choose_precision, pick_device, run, show, tell
from tokenizer import VQVAE
from var import VAR

# The comparison: a depth, and scales by n, whose sides grow geometrically, as in the appendix.
DEPTH = 6
GRIDS = {8: (1, 2, 3, 4, 6, 8),
         16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
         24: (1, 2, 3, 4, 6, 8, 10, 13, 18, 24),
         32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}


def seconds_of(work):
    """The median time of work(): of as many calls as it takes to know it, for ten seconds at most,
    after one that does not count: it allocates memory and compiles. Timer waits for a GPU."""
    work()
    timer = Timer('work()', globals={'work': work}, num_threads=torch.get_num_threads())
    return timer.adaptive_autorange().median


def matmul_throughput(device):
    """FLOP/s of the product of two square matrices, in the precision that the device trains in."""
    n = 8192 if device.type == 'cuda' else 4096
    a, b = torch.randn(2, n, n, device=device).to(getattr(torch, choose_precision(device)))
    peak = 2 * n ** 3 / seconds_of(lambda: a @ b)
    show('peak matmul throughput:', {'GFLOP/s': peak / 1e9})
    return peak


def training(vae, d, B, device, compiled):
    """Seconds of a forward and a backward pass of VAR on B images, and the FLOP that it takes."""
    var = VAR(depth=d).to(device).train()
    maps = [torch.randint(var.vocab_size, (B, p * p), device=device) for p in var.patch_nums]
    labels = torch.randint(var.num_classes, (B,), device=device)            # (B,)
    x = vae.var_input(maps)                                                 # (B, L - l, z)
    targets = torch.cat(maps, dim=1)                                        # (B, L)

    def step():
        with autocast(device):
            _, loss = var(labels, x, targets)
        loss.backward()
        var.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    if compiled:
        for block in var.blocks:                                # as train.py --compile does
            block.compile()
    return seconds_of(step), counter.get_total_flops()


def sampler(vae, d, B, device):
    """A function that draws the tokens of B guided images, as the release does: K maps (B, l). vae
    is a VQVAE or a Raster."""
    var = VAR(vae.patch_nums, d).to(device).eval()
    labels = torch.arange(B, device=device) % var.num_classes               # (B,)

    def generate():
        with autocast(device):
            return var.generate(vae, labels, cfg=1.5, top_k=900, top_p=0.96)

    return generate


def sampling(vae, d, B, device):
    """Figures of sampling B guided images, a dict."""
    generate = sampler(vae, d, B, device)
    maps = generate()                                                       # K of (B, l)
    with autocast(device):
        decoder = seconds_of(lambda: vae.decode(maps))
    tokens = seconds_of(generate)
    return {'images/s': B / (tokens + decoder), 'ms without the decoder': 1e3 * tokens,
            'ms of the decoder': 1e3 * decoder}


def compare(device, path):
    """Time to draw the tokens of an image, by VAR and by raster-scan AR, for last maps of several
    sides n; and its picture in log-log, where the slope of a line is the exponent of n."""
    times = []
    for n, sides in GRIDS.items():
        small, single = (VQVAE(x, ch=32, ch_mult=(1,)).to(device).eval() for x in (sides, (n,)))
        ours, others = (seconds_of(sampler(x, DEPTH, 1, device)) for x in (small, Raster(single)))
        times.append((ours, others))
        show(f'{n}x{n} tokens:', {'ms by VAR': 1e3 * ours, 'ms by raster-scan AR': 1e3 * others,
                                  'times as fast': others / ours})
    figure = Figure(figsize=(6.4, 4.4), layout='constrained')
    axis = figure.subplots()
    for kind, exponent, y in zip(('VAR', 'raster-scan AR'), (4, 6), zip(*times)):
        growth = np.polyfit(np.log([*GRIDS]), np.log(y), 1)[0]
        axis.loglog([*GRIDS], y, 'o-', label=f'{kind}, cached keys and values: n^{growth:.1f}\n'
                                             f'(paper, without cache: n^{exponent})')
    axis.set(xlabel='side n of the last token map',
             ylabel=f'seconds per image, depth {DEPTH}, without decoder')
    axis.set_xticks([*GRIDS], [*GRIDS])
    axis.tick_params(axis='x', which='minor', bottom=False, labelbottom=False)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main():
    parser = make_parser(__doc__, '--device')
    add = parser.add_argument
    add('--depths', type=at_least_1, nargs='+', default=[2, 4, 6, 16], help='[2 4 6 16]')
    add('--batch', type=at_least_1, default=4, help='images in training and in the tokenizer [4]')
    add('--draw', type=at_least_1, nargs='+', default=[1, 8], help='images sampled at once [1 8]')
    add('--compile', action='store_true', help='training also with torch.compile')
    args = parser.parse_args()
    torch.manual_seed(0)
    device, B = pick_device(args.device), args.batch
    tell(f'{device}, {choose_precision(device)}, torch {torch.__version__}')
    peak = matmul_throughput(device)
    vae = VQVAE().to(device).eval().requires_grad_(False)
    images = torch.rand(B, 3, 256, 256, device=device) * 2 - 1              # (B, 3, H, W)
    with autocast(device):
        maps = vae.encode(images)                                           # K of (B, l)
        show(f'tokenizer, batch {B}:', {
            'ms per image to encode': 1e3 * seconds_of(lambda: vae.encode(images)) / B,
            'ms per image to decode': 1e3 * seconds_of(lambda: vae.decode(maps)) / B})
    for d in args.depths:
        for compiled in [False, True] if args.compile else [False]:
            seconds, flop = training(vae, d, B, device, compiled)
            show(f'training depth {d}, batch {B}, {"" if compiled else "not "}compiled:', {
                'images/s': B / seconds, 'of peak matmul throughput': flop / seconds / peak})
        for n in args.draw:
            show(f'sampling depth {d}, batch {n}:', sampling(vae, d, n, device))
    compare(device, 'bench.png')
    matmul_throughput(device)


if __name__ == '__main__':
    run(main)
