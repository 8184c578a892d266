"""Pipelines that diffusers has none for; saved pipelines name the modules of this package.

``DiffusionPipeline.from_pretrained`` looks classes of pipelines up among diffusers' own names; these are added there,
and so are schedulers, which can then be asked for by name. It loads parts from modules that are imported already, and
networks of ours are in some of these.
"""

import diffusers

from ptqd.pipelines.edm_unet import EDMUNet2DModel
from ptqd.pipelines.guided_unet import GuidedUNet2DModel
from ptqd.pipelines.latent import LatentPipeline
from ptqd.pipelines.latent_class import LatentClassPipeline
from ptqd.pipelines.module import ModulePipeline
from ptqd.pipelines.pixel import PixelPipeline
from ptqd.pipelines.respaced import RespacedDDIMScheduler, RespacedDDPMScheduler

_CLASSES = (
    LatentPipeline,
    LatentClassPipeline,
    ModulePipeline,
    PixelPipeline,
    RespacedDDIMScheduler,
    RespacedDDPMScheduler,
)
for _class in _CLASSES:
    setattr(diffusers, _class.__name__, _class)

NETWORKS = (EDMUNet2DModel, GuidedUNet2DModel)
