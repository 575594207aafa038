"""Runs the whole test suite in fresh environments: the oldest versions that requirements.txt
allows, each with the oldest and the newest of the others, and the newest of all.

    python experiments/versions.py              # some gigabytes of downloads, a minute per suite
    python experiments/versions.py --only 2

Each environment is a folder below --out and is made once. Prints one line per environment.
"""
import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python (an interpreter on the PATH), then what pip installs; a name alone is the newest version.
ENVIRONMENTS = [
    ('python3.11', 'torch==2.6.0', 'numpy==1.26.4', 'pillow==10.1.0'),
    ('python3.11', 'torch==2.6.0', 'numpy', 'pillow'),
    ('python3.11', 'torch', 'numpy==1.26.4', 'pillow'),
    ('python3.11', 'torch', 'numpy', 'pillow==10.1.0'),
    ('python3.10', 'torch==2.6.0', 'numpy==1.26.4', 'pillow==10.1.0'),
    ('python3.12', 'torch', 'numpy', 'pillow'),
    ('python3.13', 'torch', 'numpy', 'pillow')]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('versions'), help='folder of environments')
    parser.add_argument('--only', type=int, nargs='+', default=range(len(ENVIRONMENTS)),
                        help='numbers of environments, from 0')
    args = parser.parse_args()
    failed = 0
    for i in args.only:
        interpreter, *packages = ENVIRONMENTS[i]
        folder = args.out.resolve() / str(i)
        python = folder / 'bin' / 'python'
        log = args.out.resolve() / f'{i}.log'
        if not (folder / 'ready').exists():
            args.out.mkdir(parents=True, exist_ok=True)
            subprocess.run([interpreter, '-m', 'venv', folder], check=True)
            subprocess.run([python, '-m', 'pip', 'install', '-q', *packages, 'pytest'], check=True)
            (folder / 'ready').touch()
        versions = subprocess.check_output([python, '-c', (
            'import platform, torch, numpy, PIL; print(platform.python_version(), "torch", '
            'torch.__version__, "numpy", numpy.__version__, "pillow", PIL.__version__)')],
            text=True)
        with open(log, 'w') as f:
            status = subprocess.run([python, '-m', 'pytest', '-q', 'test_var.py'], cwd=ROOT,
                                    stdout=f, stderr=subprocess.STDOUT).returncode
        last = log.read_text().strip().splitlines()[-1]
        print(f'{i}: Python {versions.strip()}: {last}', flush=True)
        failed += status != 0
    sys.exit(1 if failed else 0)


if __name__ == '__main__':
    main()
