"""What the commands share: errors, devices, precision, processes, the log, files."""
import os
import re
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

PRECISIONS = ('bfloat16', 'float16', 'float32')
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))       # among the processes of this machine


class UserError(Exception):
    """One line that says what is wrong and what to do. The commands print it and exit with 2."""


def reason(e):
    """The words of an exception, in one line."""
    lines = (getattr(e, 'strerror', None) or str(e) or type(e).__name__).split('\n')
    return ' '.join(line.strip() for line in lines[:2]).strip(' .:')


def run(main):
    """Runs a command. A UserError, an OSError or the end of memory ends in one line and status 2,
    Ctrl-C in one line and 130. Any other exception is a fault of the program, and keeps its
    traceback."""
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')       # names that a terminal cannot show
    status = 2
    try:
        main()
        wait_for_all()                          # until the first process has written its files
        status = 0
    except KeyboardInterrupt:
        print('stopped', file=sys.stderr)
        status = 130                                            # as shells have it: 128 + SIGINT
    except (UserError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
    except (RuntimeError, MemoryError) as e:
        # Of CUDA and its libraries, of torch on a CPU, and of numpy.
        if not re.search('out of memory|alloc_failed|allocate|MemoryError', repr(e), re.I):
            raise
        print('error: out of memory: try a smaller --tokenizer-batch in stage 1, --micro-batch in '
              'stage 2, or --batch in sample.py', file=sys.stderr)
    if dist.is_initialized():
        # While Python shuts down, a thread of gloo can abort the process: os._exit skips that.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def pick_device(name=None):
    """The named device, or cuda where there is one, else cpu. UserError if it cannot be used. Under
    torchrun it joins the process group, and each process takes the GPU of its local rank."""
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(f'cuda:{LOCAL_RANK}' if name == 'cuda' else name)
        torch.zeros(1, device=device)                           # only use shows whether it is there
        if device.type == 'cuda':
            torch.cuda.set_device(device)                       # for the collectives
        if int(os.environ.get('WORLD_SIZE', 1)) > 1 and not dist.is_initialized():
            # The others wait while one downloads or evaluates: longer than the default, 10 minutes.
            is_cuda = device.type == 'cuda'
            dist.init_process_group('nccl' if is_cuda else 'gloo', timeout=timedelta(hours=2),
                                    device_id=device if is_cuda else None)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as e:
        raise UserError(f'--device {name}: {reason(e)}') from e
    return device


def choose_precision(device, name=None):
    """name, or without one the fastest of PRECISIONS that the device computes natively."""
    if name:
        return name
    if device.type == 'cuda':                   # from Ampere on; a V100 and a T4 have float16
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return 'bfloat16' if bfloat16 else 'float16'
    native = getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)
    return 'bfloat16' if device.type == 'cpu' and native() else 'float32'


def autocast(device, name=None):
    """An autocast context in the named precision, by default in the device's best one."""
    name = choose_precision(device, name)
    return torch.autocast(device.type, getattr(torch, name), enabled=name != 'float32')


def rank_and_world():
    """The rank of this process and the number of processes: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all():
    """Returns when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensors):
    """Replaces tensors of the same shapes in all processes by their sums, in one transfer."""
    if dist.is_initialized():
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x))


def gather(x):
    """In the first process a list of every process's x, a picklable object; None in the others."""
    rank, world = rank_and_world()
    parts = [x] * world if rank == 0 else None
    if world > 1:
        dist.gather_object(x, parts)
    return parts


def agree(x, what):
    """UserError in the first process unless x is the same in all: a shared disk can show one fewer
    files."""
    found = gather(x) or [x]
    if found != found[:1] * len(found):
        raise UserError(f'the processes do not see the same {what}: {found}')


def seed_of(*numbers):
    """One seed, from 0 to 2^63 - 1, that depends on all the numbers."""
    first, *others = numbers
    sequence = np.random.SeedSequence(first, spawn_key=others)
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def tell(text, end='\n'):
    """Prints a text, in the first process alone."""
    if rank_and_world()[0] == 0:
        print(text, end=end, flush=True)


def progress(what, done, total, began):
    """Prints on one line, again and again, how many of something are done and the time that is
    left. began: time.monotonic() of the start."""
    left = (time.monotonic() - began) / max(1, done) * (total - done)
    tell(f'\r{what}: {done} of {total}, {left:.0f} s left ', end='\n' if done == total else '')


def show(title, figures, names=None, more=''):
    """Prints figures, or those of them that are named, in the first process alone."""
    parts = [f'{name} {figures[name]:.4g}' for name in names or figures if name in figures]
    tell('  '.join([title, *parts, more]))


def write_log(path, stage, step, figures):
    """Appends to a csv file one row per figure: (stage, step, unix time, name, value). A resumed
    run repeats the steps since the checkpoint, and their rows."""
    with open(path, 'a') as f:
        if f.tell() == 0:                                       # a new file
            f.write('stage,step,time,name,value')
        # The end of a row is written with the next one, which is whole if a kill has cut this one.
        for name, value in figures.items():
            f.write(f'\n{stage},{step},{time.time():.1f},{name},{value}')


def write_file(path, write):
    """Calls write(file) on a temporary file and renames it to path, which therefore holds either
    its old or its new content, never a part. UserError where the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')             # in the same folder, or no rename works
    try:
        with open(part, 'wb') as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())                            # or a crash could leave an empty file
        os.replace(part, path)
    except (OSError, RuntimeError) as e:                    # torch.save raises RuntimeError
        raise UserError(f'cannot write {path}; the disk may be full: {reason(e)}') from e
    finally:
        part.unlink(missing_ok=True)
