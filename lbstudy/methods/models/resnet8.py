"""ResNet-8, the smallest CIFAR ResNet: 75,290 parameters on 3x32x32 images and 10 classes.

Shallue et al. 2019 have this depth and width on CIFAR-10, but with pre-activation blocks and without batch norm.
"""

from lbstudy.methods.models.cifar_resnet import of_depth

METHOD = of_depth(8, source="He et al. 2016; Shallue et al. 2019")
