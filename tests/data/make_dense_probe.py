"""Makes dense_probe.safetensors: the dense probes' pieces, computed by PyTorch and torchmetrics in float64.

    python tests/data/make_dense_probe.py        in an environment with torch, torchmetrics and safetensors

The tests need neither; PyTorch's own layers and interpolation are the reference, the formulas are those of the
protocol, and nothing of omnistream_jax is imported.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassJaccardIndex

PATH = Path(__file__).with_name("dense_probe.safetensors")


def sig(prediction, target, with_variance):
    """SigLoss of the pixels with a target."""
    valid = target > 0
    g = torch.log(prediction[valid] + 1e-3) - torch.log(target[valid] + 1e-3)
    return torch.sqrt(0.15 * g.mean() ** 2 + (torch.var(g) if with_variance else 0.0))


def linear(width, outputs, tensors, prefix):
    """Batch normalisation and a 1x1 convolution, in training mode, with random parameters."""
    norm, conv = nn.BatchNorm2d(width), nn.Conv2d(width, outputs, 1)
    nn.init.normal_(norm.weight, 1.0, 0.2)
    nn.init.normal_(norm.bias, 0.0, 0.2)
    nn.init.normal_(conv.weight, 0.0, 0.5)
    nn.init.normal_(conv.bias, 0.0, 0.5)
    for name, value in (("norm.scale", norm.weight), ("norm.bias", norm.bias), ("linear.bias", conv.bias)):
        tensors[f"{prefix}/{name}"] = value.detach().clone()
    tensors[f"{prefix}/linear.kernel"] = conv.weight.detach()[:, :, 0, 0].T.clone()
    return norm, conv


def keep_gradients(norm, conv, tensors, prefix):
    """The parameters' gradients, and the running statistics."""
    tensors[f"{prefix}/grad/norm.scale"], tensors[f"{prefix}/grad/norm.bias"] = norm.weight.grad, norm.bias.grad
    tensors[f"{prefix}/grad/linear.kernel"] = conv.weight.grad[:, :, 0, 0].T
    tensors[f"{prefix}/grad/linear.bias"] = conv.bias.grad
    tensors[f"{prefix}/running_mean"], tensors[f"{prefix}/running_variance"] = norm.running_mean, norm.running_var


def depth(tensors):
    """Four images of 3 x 5 patches, targets of 13 x 17 pixels, two images a loss."""
    features, target = torch.randn(4, 6, 3, 5) * 2 + 1, torch.rand(4, 13, 17) * 9 + 0.5
    target[torch.rand_like(target) < 0.2] = 0
    tensors |= {"depth/features": features.permute(0, 2, 3, 1), "depth/target": target}
    norm, conv = linear(6, 8, tensors, "depth")
    weights = torch.relu(conv(norm(features))) + 0.1
    maps = (weights / weights.sum(1, keepdim=True) * torch.linspace(0.001, 10, 8)[None, :, None, None]).sum(1)
    tensors["depth/maps"] = maps
    large = F.interpolate(maps[:, None], size=(13, 17), mode="bilinear", align_corners=False)[:, 0]
    tensors["depth/large"] = large
    losses = {
        with_variance: sum(sig(large[i : i + 2], target[i : i + 2], with_variance) for i in (0, 2)) / 2
        for with_variance in (False, True)
    }
    tensors |= {"depth/loss": losses[True], "depth/loss_without_variance": losses[False]}
    losses[True].backward()
    keep_gradients(norm, conv, tensors, "depth")


def segmentation(tensors):
    """Two images of 4 x 3 patches, 5 classes, targets of 16 x 11 pixels."""
    features, labels = torch.randn(2, 6, 4, 3), torch.randint(0, 5, (2, 16, 11))
    labels[torch.rand(labels.shape) < 0.3] = 255
    tensors |= {"segmentation/features": features.permute(0, 2, 3, 1), "segmentation/labels": labels}
    norm, conv = linear(6, 5, tensors, "segmentation")
    logits = F.interpolate(conv(norm(features)), size=(16, 11), mode="bilinear", align_corners=False)
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=255)
    tensors |= {"segmentation/loss": losses.mean(), "segmentation/loss_labelled": losses[labels != 255].mean()}
    losses.mean().backward()
    keep_gradients(norm, conv, tensors, "segmentation")


def sliding(tensors):
    """A picture of 16 x 38 pixels under windows of 16 at every 10th, patches of 4; an annotation of 29 x 57 pixels."""
    starts = [(0, left) for left in (0, 10, 20, 22)]
    logits = torch.randn(len(starts), 5, 4, 4)
    total, count = torch.zeros(1, 5, 16, 38), torch.zeros(16, 38)
    for (top, left), window in zip(starts, logits, strict=True):
        upsampled = F.interpolate(window[None], size=(16, 16), mode="bilinear", align_corners=False)
        total[:, :, top : top + 16, left : left + 16] += upsampled
        count[top : top + 16, left : left + 16] += 1
    large = F.interpolate(total / count, size=(29, 57), mode="bilinear", align_corners=False)
    tensors |= {"sliding/logits": logits.permute(0, 2, 3, 1), "sliding/large": large[0].permute(1, 2, 0)}
    tensors["sliding/labels"] = torch.softmax(large, 1).argmax(1)[0]


def intersection_over_union(tensors):
    """Three images; of 7 classes one is in neither, one in the prediction alone, one in the truth alone."""
    prediction, target = torch.randint(0, 5, (3, 9, 8)), torch.randint(0, 5, (3, 9, 8))
    prediction[target == 3], target[target == 3] = 2, 6
    target[torch.rand(target.shape) < 0.2] = 255
    tensors |= {"miou/prediction": prediction, "miou/target": target}
    metric = MulticlassJaccardIndex(num_classes=7, average="macro", ignore_index=255)
    for one, truth in zip(prediction, target, strict=True):
        metric.update(one[None], truth[None])
    tensors["miou/value"] = metric.compute()


def nearest(tensors):
    """Labels resized by F.interpolate(mode="nearest")."""
    labels = torch.randint(0, 256, (7, 9))
    tensors["nearest/labels"] = labels
    for height, width in ((5, 13), (15, 22), (7, 4)):
        resized = F.interpolate(labels[None, None].float(), size=(height, width), mode="nearest")[0, 0]
        tensors[f"nearest/{height}x{width}"] = resized.long()


def main():
    """Writes the file beside this one."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    tensors = {}
    for part in (depth, segmentation, sliding, intersection_over_union, nearest):
        part(tensors)
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, PATH)


if __name__ == "__main__":
    main()
