"""Pipelines of latent diffusion that diffusers has none for; saved pipelines name the modules of this package.

``DiffusionPipeline.from_pretrained`` looks classes of pipelines up among diffusers' own names; these are added there.
"""

import diffusers

from ptqd.pipelines.latent import LatentPipeline
from ptqd.pipelines.latent_class import LatentClassPipeline

for _pipeline in (LatentPipeline, LatentClassPipeline):
    setattr(diffusers, _pipeline.__name__, _pipeline)
