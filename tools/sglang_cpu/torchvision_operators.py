# Declares the operators that torchvision's __init__ looks up. The compiled operators need the CUDA build of torch.
import torch

_declared_for_cpu = torch.library.Library("torchvision", "FRAGMENT")
for _operator in ("nms", "qnms"):
    _declared_for_cpu.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
