"""What is not the paper's, a room each. A room imports only from those above it.

run          errors in one line, options, devices, precision, processes, the log, atomic files
images       image files, arrays and tensors; grids
losses       L_P and L_G of equation (5)
checkpoints  files of weights: released ones, and those of train.py
folders      layouts of folders of images: classes, training, validation
data         drawn shapes, CIFAR-10, sets of images, crops, stored tokens
"""
