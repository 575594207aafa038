"""The learned losses of equation (5): L_P, and L_G with its discriminator. README.md lists where
they differ from the paper."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.checkpoints import load_weights
from tokenizer import conv3x3, group_norm

VGG = ('https://download.pytorch.org/models/vgg16-397923af.pth', '397923af')


class PerceptualLoss(nn.Module):
    """L_P of (5): the distance of two images in the features of a VGG-16 that was trained on
    ImageNet, the mean over five depths. LPIPS is the sum, and has learned weights as well.
    weights: those of the file VGG; UserError for others."""
    WIDTHS = (64, 64, 'pool', 128, 128, 'pool', 256, 256, 256, 'pool', 512, 512, 512, 'pool',
              512, 512, 512, 'pool')

    def __init__(self, weights):
        super().__init__()
        layers, c = [], 3
        for width in self.WIDTHS:
            if width == 'pool':
                layers += [nn.MaxPool2d(2)]
            else:
                layers += [conv3x3(c, width), nn.ReLU()]
                c = width
        self.layers = nn.Sequential(*layers).requires_grad_(False)
        convs = {name.removeprefix('features.'): value for name, value in weights.items()
                 if name.startswith('features.')}
        load_weights(self.layers, convs, 'VGG-16')
        self.register_buffer('mean', torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer('deviation', torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def features(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> a map of each depth, (B, C, height, width)."""
        x = (images / 2 + 0.5 - self.mean) / self.deviation
        found = []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):                 # a depth ends
                found.append(x)
            x = layer(x)
        return found

    def forward(self, rebuilt, images):
        """Images (B, 3, H, W) in [-1, 1], twice -> their mean distance, a scalar."""
        with torch.no_grad():                                   # the real images need no gradient
            real = self.features(images)
        distances = []
        for f, g in zip(self.features(rebuilt), real):
            # Vectors of unit length at every place.
            f, g = F.normalize(f.float(), dim=1), F.normalize(g.float(), dim=1)
            distances.append((f - g).square().sum(1).mean())
        return sum(distances) / len(distances)


class AdversarialLoss(nn.Module):
    """lambda_G L_G of (5), with VQGAN's lambda_G, and the hinge loss of a patch discriminator."""

    def __init__(self, share):
        super().__init__()
        self.share = share
        # (B, 3, H, W) -> (B, 1, H/8, W/8): a score per patch, above 0 for real, below for rebuilt.
        layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
        for c in (64, 128):
            layers += [nn.Conv2d(c, 2 * c, 4, 2, 1), group_norm(2 * c), nn.LeakyReLU(0.2)]
        self.disc = nn.Sequential(*layers, conv3x3(256, 1))

    def forward(self, images, rebuilt, others, last_layer):
        """The loss to minimise, of tokenizer and discriminator at once, and lambda_G; scalars.

        images, rebuilt (B, 3, H, W); others: the sum of the other losses, a scalar; last_layer: the
        weights of the decoder's last layer.
        """
        # The tokenizer's term, L_G: it makes `rebuilt` look real. The discriminator's weights are
        # constants in it, so that its gradient reaches the tokenizer alone.
        constants = {name: p.detach() for name, p in self.disc.named_parameters()}
        # In float32: the gradient that enters the mean, lambda_G times the scaler's factor, exceeds
        # float16.
        fool = -torch.func.functional_call(self.disc, constants, rebuilt).float().mean()
        # The discriminator's term: real images above 1, rebuilt ones below -1. `rebuilt` is a
        # constant in it, so that its gradient reaches the discriminator alone. One optimizer and
        # one backward pass of the sum therefore serve both.
        real = self.disc(images).float()
        fake = self.disc(rebuilt.detach()).float()
        judge = (F.relu(1 - real) + F.relu(1 + fake)).mean() / 2
        # lambda_G is `share` times the ratio of the norms of two gradients at the decoder's last
        # layer: of the other losses, and of L_G. 4096 keeps both from vanishing in float16, and
        # cancels out.
        norms = []
        for loss in (others, fool):
            (gradient,) = torch.autograd.grad(4096 * loss, last_layer, retain_graph=True)
            norms.append(gradient.norm())
        weight = (self.share * norms[0] / (norms[1] + 1e-4)).clamp_max(1e4)
        return weight * fool + judge, weight
