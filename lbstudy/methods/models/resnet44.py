"""ResNet-44, the CIFAR ResNet with which Hoffer et al. 2017 met the generalisation gap: 0.66 million parameters."""

from lbstudy.methods.models.cifar_resnet import of_depth

METHOD = of_depth(44, source="He et al. 2016; Hoffer et al. 2017")
