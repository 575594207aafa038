"""Everything that has to be measured on a GPU, in one call that ends by itself.

    python experiments/gpu.py --data cifar10                # nine minutes, on a CUDA GPU
    python experiments/gpu.py --tiny --device cpu           # tries the script itself, on a CPU

In this order, each part within its share of the time: whether a training step waits for the GPU;
the tests; speed and memory at the official sizes (bench.py); the shapes from training to samples;
CIFAR-10 with the preset 32-gpu, for as long as is left. Writes gpu.json into --out after every
part: status, seconds and the last lines of each, and all figures of bench.csv. A part that fails
or runs out of time does not keep the others from running. CIFAR-10 continues in the next call.
"""
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tokenizer import VQVAE, write_file                                     # noqa: E402
from train import (Classifier, ClassifierStage, ImageSet, TokenizerStage,  # noqa: E402
                   TransformerStage, make_config, make_optimizers, make_scaler, shapes, train_step)
from var import VAR, Parser, number, pick_device, run                       # noqa: E402


def check_synchronisation(device):
    """Runs steps of all stages while every synchronisation with the GPU raises an error."""
    config = make_config({'data': 'shapes', 'perceptual': 1., 'adversarial': 0.5, 'muon_lr': 0.02,
                          'classifier_steps': 8, 'tokenizer_steps': 8}, {})
    config.device = device
    vae = VQVAE(config.patch_nums, **config.network).to(device)
    images = ImageSet(*shapes(64), 32)
    var = VAR(config.patch_nums, 2, 10, *vae.quantize.embedding.weight.shape).to(device)
    stored = np.ones((64, 1, len(var.mask)), np.int16), images.labels
    classifier = Classifier(10)
    stages = (ClassifierStage(config, classifier, images, images),
              TokenizerStage(config, vae, images, images, classifier),
              TransformerStage(config, vae, var, stored, stored))
    for stage in stages:
        stage = stage.to(device).train()
        optimizers, scaler = make_optimizers(stage), make_scaler(config)
        batch = next(stage.batches(0))
        for stage.step in range(8):
            if stage.step == 1 and device.type == 'cuda':       # the first step allocates memory
                torch.cuda.set_sync_debug_mode('error')
            train_step(stage, optimizers, scaler, batch)
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('default')
        for trained in stage.learned().values():
            trained.requires_grad_(False)
    on_gpu = device.type == 'cuda'
    print('no step waited for the GPU' if on_gpu else 'all stages ran; there is no GPU to wait for')


def run_part(name, commands, seconds):
    """Runs commands one after another, within so many seconds in all; a training run that is out of
    time is asked to stop, and saves. Returns a dict for gpu.json."""
    began, tail, status = time.time(), [], 0
    for command in commands:
        process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, cwd=ROOT)
        try:
            output, _ = process.communicate(timeout=max(1, began + seconds - time.time()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                output, _ = process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
        status = process.returncode
        tail += output.strip().splitlines()[-8:]
        if status:
            break
    print(f'{name}: status {status}, {time.time() - began:.0f} s')
    print(*tail[-3:], sep='\n', flush=True)
    return {'status': status, 'seconds': time.time() - began, 'output': tail}


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add('--data', default='cifar10', help='cifar10, its archive, or a copy in class folders')
    add('--out', type=Path, default=Path('gpu'), help='folder of gpu.json and all runs')
    add('--minutes', type=number(float, 0.1), default=9., help='when to end (default: 9)')
    add('--tiny', action='store_true', help='tiny sizes, to try the script on a CPU')
    add('--synchronisation', action='store_true', help='only the first part, in this process')
    add('--device', help='cuda, mps or cpu; default: the best there is')
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.synchronisation:
        return check_synchronisation(device)
    ends, out = time.time() + 60 * args.minutes, args.out.resolve()
    if args.tiny:
        out = out / 'tiny'                      # so that a real run does not resume a tiny one
    out.mkdir(parents=True, exist_ok=True)
    (out / 'bench.csv').unlink(missing_ok=True)     # of an earlier call
    where = ['--device', device.type]
    bench = ['--depths', 16, '--batch', 32, '--draw', 1, 16, 64, '--baseline-depth', 16,
             '--grids', 16, 32, '--compile']
    few, cifar = [], ['--preset', '32-gpu']
    if args.tiny:
        bench = ['--depths', 1, '--batch', 1, '--draw', 1, '--baseline-depth', 1, '--grids', 8, 16,
                 '--ch', 32, '--compile']
        few = ['--classifier-steps', 8, '--tokenizer-steps', 8, '--steps', 8]
        cifar = ['--preset', '32', *few, '--limit', 20]
    ckpt, resumed = out / 'cifar10' / 'ckpt.pt', []
    if ckpt.exists():
        resumed = ['--resume']
    parts = {
        'synchronisation': (60, [['experiments/gpu.py', '--synchronisation', *where]]),
        'tests': (120, [['-m', 'pytest', '-q', 'test_var.py']]),
        'bench': (210, [['experiments/bench.py', *bench, '--out', out, *where]]),
        'shapes': (90, [['train.py', '--out', out / 'shapes', *few, *where],
                        ['experiments/judge.py', '--ckpt', out / 'shapes' / 'ckpt.pt', *where]]),
        'cifar10': (600, [['train.py', '--data', args.data, *cifar, '--out', out / 'cifar10',
                           *where, *resumed]]),
        'samples': (60, [['sample.py', '--ckpt', ckpt, '--n', 200, '--cls', 'all', '--npz',
                          out / 'cifar10.npz', *where],
                         ['sample.py', '--ckpt', ckpt, '--out', out / 'cifar10.png', *where]])}
    device_name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'
    result = {'device': device_name, 'torch': torch.__version__, 'parts': {}}
    for name, (seconds, commands) in parts.items():
        # CIFAR-10 leaves a minute for its samples.
        left = ends - time.time() - (60 if name == 'cifar10' and not args.tiny else 0)
        if left < 5:
            print(f'{name}: no time left')
            continue
        result['parts'][name] = run_part(name, commands, min(seconds, left))
        if (out / 'bench.csv').exists():
            with open(out / 'bench.csv', newline='') as f:
                result['bench'] = [*csv.DictReader(f)]
        write_file(out / 'gpu.json', lambda f: f.write(json.dumps(result, indent=1).encode()))


if __name__ == '__main__':
    run(main)
