"""Speed of this code on this machine: training, sampling, and VAR against raster-scan AR.

    python experiments/bench.py                                     # for a CPU
    python experiments/bench.py --depths 16 --batch 32 --draw 1 16 64 --baseline-depth 16 --compile

Paper: Table 1 (time of sampling), and the appendix on time complexity: O(n^4) for VAR, and O(n^6)
for raster-scan AR without cached keys and values. Training and sampling have the official sizes at
256 px, the comparison has last maps of 8x8 to 32x32. No weights are needed, because speed does not
depend on them. All times are medians. Training is a forward and a backward pass on given tokens and
inputs, without the optimizer; all samples are guided, which doubles their batch. The peak matmul
throughput is measured first and last, because a shared machine changes its speed. The second
command suits a large GPU.
Writes bench.png, the comparison of VAR and raster-scan AR, for two --grids or more.

Letters: B images per batch, n side of the last token map, d depth, z code dimension, l tokens of
one scale, L tokens of all.
"""
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

matplotlib.use('Agg')
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from raster import Raster
from support.options import a_path, add_shared, at_least_1, make_parser
from support.run import cast_linear_weights, choose_precision, pick_device, precision, run
from tokenizer import VQVAE
from var import VAR

# The scales of the comparison, by n. The sides grow geometrically, as the appendix assumes.
GRIDS = {8: (1, 2, 3, 4, 6, 8),
         16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
         24: (1, 2, 3, 4, 6, 8, 10, 13, 18, 24),
         32: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)}
EXPONENTS = {'VAR': 4, 'raster-scan AR': 6}         # of n, in the appendix, without a cache


def seconds_of(work):
    """The median time of work(): of as many calls as it takes to know it, for ten seconds at most.

    One call before, which allocates memory and compiles, does not count. Timer waits for a GPU.
    """
    work()
    timer = Timer('work()', globals={'work': work}, num_threads=torch.get_num_threads())
    return timer.adaptive_autorange().median


def matmul_throughput(device):
    """FLOP/s of the product of two square matrices, in the precision that the device trains in."""
    n = 8192 if device.type == 'cuda' else 4096
    dtype = getattr(torch, choose_precision(device))
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return 2 * n ** 3 / seconds_of(lambda: a @ b)


def peak_memory(device):
    """{'GiB at most': ...} of all tensors on a CUDA device since the last call; {} elsewhere."""
    if device.type != 'cuda':
        return {}
    most = torch.cuda.max_memory_allocated(device) / 2 ** 30
    torch.cuda.reset_peak_memory_stats(device)
    return {'GiB at most': most}


# ---- What is measured ----


def training(vae, d, B, device, compiled):
    """Seconds of a forward and a backward pass of VAR on B images, and the FLOP that it takes."""
    var = VAR(depth=d).to(device).train()
    maps = [torch.randint(var.vocab_size, (B, p * p), device=device) for p in var.patch_nums]
    labels = torch.randint(var.num_classes, (B,), device=device)            # (B,)
    x = vae.var_input(maps)                                                 # (B, L - l, z)
    targets = torch.cat(maps, dim=1)                                        # (B, L)

    def step():
        with precision(device):
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
    """A function that draws the tokens of B guided images, as the release does: K maps (B, l). vae:
    a VQVAE or a Raster, whose scales the transformer has."""
    var = cast_linear_weights(VAR(vae.patch_nums, d).eval(), device)
    labels = torch.arange(B, device=device) % var.num_classes               # (B,)

    def generate():
        with precision(device):
            return var.generate(vae, labels, cfg=1.5, top_k=900, top_p=0.96)

    return generate


def sampling(vae, d, B, device):
    """Figures of sampling B guided images, a dict."""
    generate = sampler(vae, d, B, device)
    maps = generate()                                                       # K of (B, l)

    def decode():
        with precision(device):
            vae.decode(maps)

    tokens, pixels = seconds_of(generate), seconds_of(decode)
    figures = {'images/s': B / (tokens + pixels), 'ms without the decoder': 1e3 * tokens,
               'ms of the decoder': 1e3 * pixels}
    if device.type == 'cuda':
        # Starting the hundreds of small kernels of a pass takes longer than running them. Nothing
        # in generate() waits for the GPU, so that all of it can be recorded and started as a whole.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            generate()
        figures['ms without the decoder, as a CUDA graph'] = 1e3 * seconds_of(graph.replay)
    return figures


def baseline(n, d, device):
    """Seconds for the tokens of one guided image, whose last map is (n, n): by VAR, and by
    raster-scan AR with cached keys and values."""
    seconds = []
    for sides, kind in ((GRIDS[n], lambda vae: vae), ((n,), Raster)):
        vae = VQVAE(sides, ch=32, ch_mult=(1,)).to(device).eval()
        seconds.append(seconds_of(sampler(kind(vae), d, 1, device)))
    return seconds


def draw(sides, times, d, path):
    """The comparison in log-log: sides (n,), times {kind: seconds of each side}. Returns
    {kind: exponent of n}, which a line through the points gives."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4), constrained_layout=True)
    growth = {}
    for kind, seconds in times.items():
        growth[kind] = np.polyfit(np.log(sides), np.log(seconds), 1)[0]
        label = (f'{kind}, cached keys and values: n^{growth[kind]:.1f}\n'
                 f'(paper, without cache: n^{EXPONENTS[kind]})')
        axis.loglog(sides, seconds, 'o-', label=label)
    axis.set(xlabel='side n of the last token map',
             ylabel=f'seconds per image, depth {d}, without decoder', xticks=sides)
    axis.set_xticklabels(sides)
    axis.tick_params(axis='x', which='minor', bottom=False, labelbottom=False)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    return growth


def parse():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add('--depths', type=at_least_1, nargs='+', default=[2, 4, 6, 16],
        help='that are trained and sampled, at 256 px [2 4 6 16]')
    add('--batch', type=at_least_1, default=4,
        help='images that are tokenized, and images per training step [4]')
    add('--draw', type=at_least_1, nargs='+', default=[1, 8],
        help='images sampled at once [1 8]')
    add('--baseline-depth', type=at_least_1, default=6,
        help='depth of VAR and of raster-scan AR in their comparison [6]')
    add('--grids', type=int, nargs='+', choices=GRIDS, default=[*GRIDS],
        help='sides of the last token map in that comparison [all of these]')
    add('--compile', action='store_true', help='training also with torch.compile')
    add('--out', type=a_path, default='bench.png', help='the picture [bench.png]')
    add_shared(parser, '--device')
    return parser.parse_args()


def main():
    args = parse()
    torch.manual_seed(0)
    device = pick_device(args.device)
    hardware = f'{torch.get_num_threads()} threads'
    if device.type == 'cuda':
        hardware = torch.cuda.get_device_name(device)
    print(f'{device} ({hardware}), {choose_precision(device)}, torch {torch.__version__}',
          flush=True)

    def report(what, figures):
        """Prints figures {unit: value} of what was measured since the last call."""
        figures = {**figures, **peak_memory(device)}
        print(f'{what}:', ', '.join(f'{value:.4g} {unit}' for unit, value in figures.items()),
              flush=True)

    peak = matmul_throughput(device)
    report('peak matmul throughput', {'GFLOP/s': peak / 1e9})

    B, vae = args.batch, VQVAE().to(device).eval().requires_grad_(False)
    images = torch.rand(B, 3, 256, 256, device=device) * 2 - 1              # (B, 3, H, W)
    with precision(device):
        maps = vae.encode(images)                                           # K of (B, l)
        report(f'tokenizer, batch {B}', {
            'ms per image to encode': 1e3 * seconds_of(lambda: vae.encode(images)) / B,
            'ms per image to decode': 1e3 * seconds_of(lambda: vae.decode(maps)) / B})

    for d in args.depths:
        for compiled in [False, True] if args.compile else [False]:
            seconds, flop = training(vae, d, B, device, compiled)
            how = 'compiled' if compiled else 'not compiled'
            report(f'training depth {d}, batch {B}, {how}', {
                'images/s': B / seconds, 'of peak matmul throughput': flop / seconds / peak})
    for d in args.depths:
        for n in args.draw:
            report(f'sampling depth {d}, batch {n}', sampling(vae, d, n, device))

    times = {kind: [] for kind in EXPONENTS}
    for n in args.grids:
        seconds = baseline(n, args.baseline_depth, device)
        for kind, value in zip(times, seconds):
            times[kind].append(value)
        report(f'{n}x{n} tokens, depth {args.baseline_depth}', {
            'ms by VAR': 1e3 * seconds[0], 'ms by raster-scan AR': 1e3 * seconds[1],
            'times as fast': seconds[1] / seconds[0]})
    if len(args.grids) > 1:
        growth = draw(args.grids, times, args.baseline_depth, args.out)
        report('growth with n', {f'as exponent of {kind}': growth[kind] for kind in growth})
    report('peak matmul throughput, at the end', {'GFLOP/s': matmul_throughput(device) / 1e9})


if __name__ == '__main__':
    run(main)
