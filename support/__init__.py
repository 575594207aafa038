"""What stands beside the method, a module each. A module imports only from those above it.

run          errors in one line, devices, precision, processes, random numbers, the log, files
options      types of options, what several commands share, the recipes of train.py, --cls
images       image files, arrays and tensors; grids; sets of images that were read once
checkpoints  files of weights: ckpt.pt, and the released ones
losses       L_P and L_G of equation (5)
grade        PSNR and codebook usage; loss and token error per scale
data         drawn shapes, CIFAR-10, folders of images; the tokens of a run
"""
import os

# Threads of GNU OpenMP wait for each other in a long loop: beside another busy process each small
# operation then waits for the thread that lost its core. Without a loop (OMP_WAIT_POLICY=PASSIVE) a
# process that is alone is slower. So a short loop is set, before torch is loaded, which reads it.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '3000')
