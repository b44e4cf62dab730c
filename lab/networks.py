"""The paper's networks and the images they take: six of torchvision, and BiT as timm has it.

`config` needs arch, init (pretrained or random) and weights: "" for the library's own, downloaded;
a file; or "random", which stands in for pre-trained weights where a command is only tried.
"""

from pathlib import Path

import torch

import common
from data.trees import reading

SIX = "alexnet resnet18 resnet50 resnet152 vgg11_bn wide_resnet50_2".split()


def transforms(kind, size):
    """Training and test transform, ImageNet's channel statistics: App. B.1 and Sec. 4's recipes."""
    from torchvision import transforms as t

    end = [t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    if kind == "cifar10":  # padding 28 at 224 pixels: 4 of CIFAR's own 32
        crop = [t.Resize(size), t.RandomCrop(size, padding=size // 8), t.RandomHorizontalFlip()]
        return t.Compose([*crop, *end]), t.Compose([t.Resize(size), *end])
    crop = [t.RandomResizedCrop(size), t.RandomHorizontalFlip()]
    return t.Compose([*crop, *end]), t.Compose([t.Resize(size * 8 // 7), t.CenterCrop(size), *end])


def bit_transform(kind, size):
    """BiT's rule: below 96 pixels resize 160, crop 128, else 512 and 480; scaled to [-1, 1]."""
    from torchvision import transforms as t

    # Differs (E7): the size of BiT's inputs is not said; this is its own rule for fine-tuning
    resize, crop = (160, 128) if kind == "cifar10" else (512, 480)
    if size:
        resize, crop = size * resize // crop, size
    end = [t.ToTensor(), t.Normalize((0.5,) * 3, (0.5,) * 3)]
    return t.Compose([t.Resize(resize), t.CenterCrop(crop), *end])


def six(config, classes, seed):
    """One of the six with a new head of torch's default start."""
    from torchvision import models

    if config.arch not in SIX:
        hint = common.did_you_mean(config.arch, SIX)
        raise common.InputError(f"--arch {config.arch}: expected one of {', '.join(SIX)}{hint}")
    common.set_seed(seed)
    pinned = None
    if config.init == "pretrained" and not config.weights:
        # today's default weights are of another recipe than those of 2021
        pinned = models.get_model_weights(config.arch).IMAGENET1K_V1
    try:
        model = models.get_model(config.arch, weights=pinned)
    except OSError as error:
        raise no_weights(f"torchvision's {config.arch}", error) from error
    if config.init == "pretrained" and config.weights not in ("", "random"):
        common.load_matching(model, state_of(config.weights), config.weights)
    old = model.fc if hasattr(model, "fc") else model.classifier[-1]
    head = torch.nn.Linear(old.in_features, classes)
    if hasattr(model, "fc"):
        model.fc = head
    else:
        model.classifier[-1] = head
    return model


def bit(config, classes, seed):
    """timm's ResNet-v2; classes 0: without a head."""
    import timm

    known = timm.list_models("resnetv2_*_bit")
    if config.arch.split(".")[0] not in known:
        hint = common.did_you_mean(config.arch, known)
        raise common.InputError(f"--arch {config.arch}: expected one of {', '.join(known)}{hint}")
    common.set_seed(seed)
    online = config.init == "pretrained" and not config.weights
    file = config.weights if config.init == "pretrained" else "random"
    path = None if online or file == "random" else file
    if path and not Path(path).is_file():
        raise common.InputError(f"--weights {path}: no such file; expected BiT's .npz, or timm's")
    try:
        return timm.create_model(
            config.arch, pretrained=online, num_classes=classes, checkpoint_path=path or ""
        )
    except Exception as error:  # the hub's client has types of its own, a foreign file all others
        raise no_weights(f"timm's {config.arch}" if online else path, error) from error


def no_weights(what, error):
    return common.InputError(
        f"could not get {what} ({common.first_line(error)}); without a network, get the file"
        " elsewhere and pass --weights FILE"
    )


def state_of(path):
    with reading(f"--weights {path}", "expected a state dict, as torchvision's .pth is one"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
