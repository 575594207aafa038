"""What stands beside the method, a module each. A module imports only from those above it.

run          errors in one line, devices, precision, processes, random numbers, log, files, folders
folders      layouts of folders of images: classes, training, validation
options      types of options; what --cls means; the options of train.py, as a table
images       image files, arrays and tensors; grids
checkpoints  files of weights: released ones, and those of train.py; the models of a run
losses       L_P and L_G of equation (5)
grade        PSNR, SSIM and codebook usage; loss and token error per scale
data         drawn shapes, CIFAR-10, sets of images, crops
tokens       stored tokens, for stage 2
"""
