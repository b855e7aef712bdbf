"""The vision models of the checkpoint-alteration studies in two frameworks, their data and recipes.

- `architectures`: AlexNet, VGG16, ResNet18 and ResNet50 for 32x32 images, described once, layer by layer.
- `torch_models`, `keras_models`: build a description; the twins are equal layer by layer.
- `weights`: converts a twin's weights into the other's.
- `cifar`, `digits`: images; `augment`: random crops and flips keyed on (seed, epoch, index).
- `workloads`: resumable recipes made of all of these.

Importing this package imports no framework.
"""
